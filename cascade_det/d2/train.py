"""Training of a configuration in Detectron2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.evaluation import verify_results
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import nn

from cascade_det import config
from cascade_det.d2.datasets import register_dataset
from cascade_det.d2.detector import Detector
from cascade_det.d2.evaluate import evaluate_all, evaluate_augmented
from cascade_det.d2.structures import inputs_of
from cascade_det.d2.trainer import Results, Trainer
from cascade_det.data.coco import CocoDataset
from cascade_det.engine import distributed
from cascade_det.engine.datasets import load_training_data
from cascade_det.engine.devices import on_its_device, resolve_amp_dtype, set_backends
from cascade_det.engine.divergence import replay
from cascade_det.engine.run_info import (
    RunInfo,
    check_output,
    log_learning_rate,
    warn_of_frozen_noise,
    write_config,
)
from cascade_det.engine.validation import validation_losses
from cascade_det.errors import DatasetError


def train(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Train a model by Detectron2's trainer, with everything in ``OUTPUT_DIR``.

    Args, results and errors are those of :func:`cascade_det.standalone.train`.
    """
    check_output(cfg, resume=resume)
    set_backends(cfg)
    cfg = on_its_device(cfg)
    datasets, test_datasets = load_training_data(cfg, register_dataset)
    _refuse_left_out([*datasets, *test_datasets])
    run = RunInfo(
        seed=cfg.SEED,
        class_names=list(datasets[0].class_names),
        category_ids=list(datasets[0].category_ids),
        host="detectron2",
    )
    seed_all_rng(run.seed + distributed.rank())

    def evaluate(model: nn.Module) -> Results:
        results = evaluate_all(cfg, model, test_datasets)
        if not cfg.CASCADE.VALIDATION_LOSS:
            return results
        return {**results, "validation": _losses_on(cfg, model, test_datasets)}

    trainer = Trainer(cfg, run, evaluate if test_datasets else None)
    trainer.resume_or_load(resume)
    write_config(cfg, resume=resume)
    log_learning_rate(cfg)
    if not cfg.MODEL.WEIGHTS and not resume:
        warn_of_frozen_noise(cfg)
    trainer.train()
    if cfg.TEST.AUG.ENABLED and test_datasets:
        trainer.results |= evaluate_augmented(cfg, trainer.tested)
    if cfg.TEST.EXPECTED_RESULTS and distributed.is_main():
        verify_results(cfg, trainer.results)
    return trainer.results


def replay_batch(cfg: CfgNode, path: str | Path) -> list[str]:
    """Run the batch of a training that diverged again; see ``cascade_det.standalone``.

    Args:
        cfg: the configuration of that training.
        path: the file that it wrote, in either host.

    Returns:
        What was found, see :func:`cascade_det.engine.divergence.replay`.

    Raises:
        CheckpointError: the file cannot be read or is of another model.
    """
    set_backends(cfg)
    cfg = on_its_device(cfg)
    model = build_model(cfg)
    model.register_forward_pre_hook(lambda _, batch: ([inputs_of(x) for x in batch[0]],))
    with EventStorage():
        return replay(path, model, device=cfg.MODEL.DEVICE)


def _losses_on(cfg: CfgNode, model: nn.Module, datasets: Sequence[CocoDataset]) -> dict[str, float]:
    sizes = (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST)
    # As in training but for the augmentation: with the ground truth.
    mapper = DatasetMapper(
        cfg,
        is_train=True,
        augmentations=[T.ResizeShortestEdge(sizes, cfg.INPUT.MAX_SIZE_TEST)],
        recompute_boxes=False,
    )
    loaders = [
        build_detection_test_loader(
            get_detection_dataset_dicts(dataset.source.name, filter_empty=False),
            mapper=mapper,
            batch_size=config.test_loader_arguments(cfg)["images_per_batch"],
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )
        for dataset in datasets
    ]
    device = torch.device(cfg.MODEL.DEVICE)
    return validation_losses(
        Detector(model),
        (batch for loader in loaders for batch in loader),
        amp_dtype=resolve_amp_dtype(config.trainer_arguments(cfg)["amp_dtype"], device),
        device=device,
    )


def _refuse_left_out(datasets: Sequence[CocoDataset]) -> None:
    for dataset in datasets:
        if dataset.left_out:
            raise DatasetError(
                f"{dataset.source.json_file}: Detectron2 reads it itself, so that what is wrong "
                "with it cannot be left out there. Mend the file, or train with --host standalone."
            )

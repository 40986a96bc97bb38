"""Training of a configuration in Detectron2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import nn

from cascade_det import config
from cascade_det.d2.checkpoint import Checkpointer
from cascade_det.d2.config_checks import refuse_tile_head
from cascade_det.d2.datasets import (
    check_mask_format,
    refuse_left_out,
    register_dataset,
    without_maskless,
)
from cascade_det.d2.detector import Detector, image_channels
from cascade_det.d2.evaluate import check_expected, evaluate_all, with_augmentation
from cascade_det.d2.loader import build_test_loader, build_train_loader
from cascade_det.d2.segmenter import Segmenter
from cascade_det.d2.structures import check_masks_and_keypoints, to_inputs
from cascade_det.d2.trainer import Results, Trainer, build_step
from cascade_det.data.coco import CocoDataset, check_same_classes
from cascade_det.data.samples import Batch
from cascade_det.engine.automatic_batch import with_batch_size
from cascade_det.engine.batches import check_images, check_labels, check_truth
from cascade_det.engine.datasets import load_training_data, scheduled
from cascade_det.engine.devices import on_its_device, resolve_amp_dtype, set_backends
from cascade_det.engine.output_dir import check_output, record_start
from cascade_det.engine.replay import replay
from cascade_det.engine.run_info import RunInfo
from cascade_det.engine.run_lock import alone_in_output_dir
from cascade_det.engine.run_weights import resume_or_load
from cascade_det.engine.step import TrainingStep
from cascade_det.engine.training_modes import freeze_detector
from cascade_det.engine.validation import validation_losses
from cascade_det.parallel import distributed


@alone_in_output_dir
def train(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Train a model of Detectron2, with checkpoints, metrics and evaluation in ``OUTPUT_DIR``.

    Args, results and errors as in :func:`cascade_det.standalone.train`. Objects without a mask are
    left out where ``MODEL.MASK_ON``, whatever ``CASCADE.MASKLESS`` says.
    """
    if cfg.MODEL.CASCADE.EXIT.ENABLED:
        refuse_tile_head(cfg.MODEL.CASCADE.EXIT.LEARNED)
    check_output(cfg, resume=resume)
    set_backends(cfg)
    cfg = on_its_device(cfg)
    datasets, test_datasets = load_training_data(without_maskless(cfg), register_dataset)
    refuse_left_out([*datasets, *test_datasets])
    check_same_classes(datasets)
    check_mask_format(cfg, [*datasets, *(test_datasets if cfg.CASCADE.VALIDATION_LOSS else [])])
    with EventStorage():
        trial = partial(build_trial, loader=build_train_loader)
        cfg = scheduled(with_batch_size(cfg, trial, resume=resume), datasets)
    run = RunInfo.of(cfg, datasets[0], "detectron2")
    seed_all_rng(run.seed + distributed.rank())

    def evaluate(model: nn.Module) -> Results:
        results = evaluate_all(cfg, model, test_datasets)
        if not cfg.CASCADE.VALIDATION_LOSS:
            return results
        return {**results, "validation": _validation_losses(cfg, model, test_datasets)}

    trainer = Trainer(cfg, run, evaluate if test_datasets else None)
    results = run_training(trainer, resume=resume)
    if cfg.TEST.AUG.ENABLED:
        results = with_augmentation(cfg, trainer.tested, test_datasets, results)
    check_expected(cfg, results)
    return results


def build_trial(
    cfg: CfgNode, loader: Callable[[CfgNode], Iterable[Batch]]
) -> tuple[TrainingStep, Iterable[Batch]]:
    """A step on a model of its own, to try batch sizes with, and the batches of ``loader``."""
    model = build_model(cfg)
    resume_or_load(Checkpointer(model, cfg.OUTPUT_DIR, save_to_disk=False), cfg, resume=False)
    freeze_detector(model)
    return build_step(cfg, model, Trainer.build_optimizer(cfg, model)), loader(cfg)


def run_training(trainer: Trainer, *, resume: bool) -> Results:
    """Run a new trainer from its start or its last checkpoint; returns its last results."""
    trainer.resume_or_load(resume)
    record_start(trainer.cfg, resume=resume)
    trainer.train()
    return trainer.results


def replay_batch(cfg: CfgNode, path: str | Path) -> list[str]:
    """Repeat the training step at which a training diverged.

    Args:
        cfg: the configuration of that training.
        path: the file that it wrote, in either host.

    Returns:
        Lines of a report, see :func:`cascade_det.engine.replay.replay`.

    Raises:
        CheckpointError: the file cannot be read or belongs to another model.
    """
    set_backends(cfg)
    cfg = on_its_device(cfg)
    model = build_model(cfg)
    model.register_forward_pre_hook(lambda _, args: ([to_inputs(x) for x in args[0]],))
    num_classes = getattr(getattr(model, "roi_heads", model), "num_classes", sys.maxsize)

    def check(batch: Batch) -> None:
        check_images(batch, image_channels(model))
        if config.is_segmenter(cfg):
            head = cfg.MODEL.SEM_SEG_HEAD
            check_labels(batch, head.NUM_CLASSES, head.IGNORE_VALUE)
        check_truth(batch, num_classes)
        for sample in batch:
            check_masks_and_keypoints(sample)

    with EventStorage():
        return replay(path, model, device=cfg.MODEL.DEVICE, check=check)


def _validation_losses(
    cfg: CfgNode, model: nn.Module, datasets: Sequence[CocoDataset]
) -> dict[str, float]:
    sizes = (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST)
    # The mapper of training, which loads ground truth, without random augmentation.
    mapper = DatasetMapper(
        cfg,
        is_train=True,
        augmentations=[T.ResizeShortestEdge(sizes, cfg.INPUT.MAX_SIZE_TEST)],
        recompute_boxes=False,
    )
    loaders = [build_test_loader(cfg, dataset.source.name, mapper) for dataset in datasets]
    return losses_on(cfg, Detector(model), loaders)


def losses_on(
    cfg: CfgNode, detector: Detector | Segmenter, loaders: Iterable[Iterable[Batch]]
) -> dict[str, float]:
    """``validation_losses`` on loaders with ground truth, in the precision of the training."""
    device = torch.device(cfg.MODEL.DEVICE)
    return validation_losses(
        detector,
        chain.from_iterable(loaders),
        amp_dtype=resolve_amp_dtype(config.trainer_arguments(cfg)["amp_dtype"], device),
    )

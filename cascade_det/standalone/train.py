"""Training of a configuration: connects data, detector, engine and evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.data.coco import CocoDataset
from cascade_det.data.loader import build_train_loader
from cascade_det.data.samples import Batch
from cascade_det.engine.automatic_batch import with_batch_size
from cascade_det.engine.batches import check_images, check_labels, check_truth
from cascade_det.engine.datasets import load_training_data, scheduled
from cascade_det.engine.devices import set_backends
from cascade_det.engine.output_dir import check_output
from cascade_det.engine.replay import replay
from cascade_det.engine.run_lock import alone_in_output_dir
from cascade_det.engine.training_modes import freeze_detector
from cascade_det.parallel import distributed
from cascade_det.standalone.build import build_detector
from cascade_det.standalone.build_segmenter import build_segmenter
from cascade_det.standalone.detector import Detector
from cascade_det.standalone.evaluate import evaluate_all, test_loader, with_augmentation
from cascade_det.standalone.training import build_trainer, build_trial, start_run

logger = logging.getLogger(__name__)


@alone_in_output_dir
def train(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Train a detector, with checkpoints, metrics and evaluation in ``OUTPUT_DIR``.

    All processes of a training call it with the same arguments.

    Args:
        cfg: a checked configuration; ``SEED`` below 0 draws a seed.
        resume: continue from the last checkpoint in ``OUTPUT_DIR``.

    Returns:
        The results of the last evaluation, see ``evaluate``; empty without ``DATASETS.TEST``.

    Raises:
        ConfigError: ``MODEL.ROI_HEADS.NUM_CLASSES`` differs from the data, or ``OUTPUT_DIR`` holds
            another run or is used by another process.
        DatasetError: data are missing or wrong.
        CheckpointError: weights cannot be read or do not fit, or there is nothing to resume.
        FloatingPointError: training diverged.
        Interrupted: a signal ended the training; a checkpoint was saved.
    """
    check_output(cfg, resume=resume)
    set_backends(cfg)
    datasets, test_datasets = load_training_data(cfg)
    trial = partial(build_trial, build=build_detector, loader=partial(_train_loader, datasets))
    cfg = scheduled(with_batch_size(cfg, trial, resume=resume), datasets)
    detector, checkpointer, info = start_run(cfg, build_detector, datasets[0], resume=resume)
    freeze_detector(detector)
    trainer = build_trainer(
        cfg,
        detector,
        _train_loader(datasets, config.changed(cfg, "SEED", info.seed), checkpointer.start_iter),
        checkpointer,
        partial(_evaluate, cfg, test_datasets) if test_datasets else None,
        lambda: [test_loader(cfg, dataset, annotated=True) for dataset in test_datasets],
    )
    trainer.train()
    # The checkpoints hold the weights that are tested.
    return with_augmentation(cfg, checkpointer.model, test_datasets, trainer.results)


def replay_batch(cfg: CfgNode, path: str | Path) -> list[str]:
    """Repeat the training step at which a training diverged.

    Args:
        cfg: the configuration of that training.
        path: the file that it wrote.

    Returns:
        Lines of a report, see :func:`cascade_det.engine.replay.replay`.

    Raises:
        CheckpointError: the file cannot be read or belongs to another model.
    """
    set_backends(cfg)
    is_segmenter = config.is_segmenter(cfg)
    model = build_segmenter(cfg) if is_segmenter else build_detector(cfg)

    def check(batch: Batch) -> None:
        check_images(batch)
        if is_segmenter:
            head = cfg.MODEL.SEM_SEG_HEAD
            check_labels(batch, head.NUM_CLASSES, head.IGNORE_VALUE)
        else:
            check_truth(batch, cfg.MODEL.ROI_HEADS.NUM_CLASSES)

    return replay(path, model, device=model.device, check=check)


def _train_loader(
    datasets: Sequence[CocoDataset], cfg: CfgNode, start_batch: int = 0
) -> Iterable[Batch]:
    return build_train_loader(
        datasets,
        **config.input_arguments(cfg, train=True),
        **config.train_loader_arguments(cfg),
        start_batch=start_batch,
        share=(distributed.rank(), distributed.world_size()),
        on_bad_data=cfg.CASCADE.ON_BAD_DATA,
    )


def _evaluate(cfg: CfgNode, datasets: Sequence[CocoDataset], detector: Detector) -> dict[str, Any]:
    return evaluate_all(cfg, detector, datasets, Path(cfg.OUTPUT_DIR))

"""Evaluation of a detector on the test sets of its configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from torch.utils.data import DataLoader

from cascade_det import config
from cascade_det.data.coco import CocoDataset
from cascade_det.data.loader import build_test_loader
from cascade_det.data.samples import Sample
from cascade_det.engine.checkpoint import Checkpointer
from cascade_det.engine.class_frequencies import lvis_evaluators
from cascade_det.engine.datasets import images_to_optimise_with, load_datasets_to_evaluate
from cascade_det.engine.devices import set_backends
from cascade_det.engine.evaluate import add_augmented, by_dataset, evaluate_dataset
from cascade_det.engine.head_flops import region_flops
from cascade_det.engine.inference import run_inference
from cascade_det.engine.run_lock import alone_in_output_dir
from cascade_det.engine.run_weights import load_to_evaluate
from cascade_det.evaluation import CocoEvaluator
from cascade_det.monitoring.shadow import shadow_evaluators
from cascade_det.parallel import distributed
from cascade_det.standalone.augmented import AugmentedDetector
from cascade_det.standalone.build import build_detector
from cascade_det.standalone.detector import Detector
from cascade_det.standalone.optimize import optimize


@alone_in_output_dir
def evaluate(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Evaluate the weights of a configuration on ``DATASETS.TEST``.

    Several processes share the images; all return the same results, and the main one writes the
    files.

    Args:
        cfg: a checked configuration with ``MODEL.WEIGHTS``.
        resume: evaluate the last checkpoint in ``OUTPUT_DIR`` instead.

    Returns:
        The metrics ``bbox``, ``analysis``, ``stages``, ``exits`` and ``latency``, and ``shadow``
        if ``CASCADE.SHADOW_SHARE`` is above 0, and ``bbox_TTA`` if ``TEST.AUG.ENABLED``; by data
        set if there are several. They are also in ``results.json``, ``report.png`` and
        ``analysis/``, and as tables in the log.

    Raises:
        ConfigError: there is no test set or no weights, or another process uses ``OUTPUT_DIR``.
        DatasetError: data are missing or wrong, or their classes differ from those that the
            checkpoint names.
        CheckpointError: weights cannot be read or do not fit, or there is nothing to resume.
    """
    detector, datasets = load_detector(cfg, resume=resume)
    results = evaluate_all(cfg, detector, datasets, Path(cfg.OUTPUT_DIR))
    return with_augmentation(cfg, detector, datasets, results)


def load_detector(cfg: CfgNode, *, resume: bool = False) -> tuple[Detector, list[CocoDataset]]:
    """The detector with its weights, and ``DATASETS.TEST``; arguments and errors as ``evaluate``.

    The detector is optimised if ``MODEL.CASCADE.FAST.ENABLED``.
    """
    datasets = load_datasets_to_evaluate(cfg, resume=resume)
    set_backends(cfg)
    detector = build_detector(cfg)
    checkpointer = Checkpointer(detector, cfg.OUTPUT_DIR)
    load_to_evaluate(checkpointer, cfg, datasets, resume=resume)
    if (fast := config.fast_arguments(cfg)) is not None:
        optimize(detector, **fast, images=images_to_optimise_with(cfg))
    return detector, datasets


def test_loader(
    cfg: CfgNode,
    dataset: CocoDataset,
    *,
    annotated: bool = False,  # noqa: PT028 - not a test
) -> DataLoader[Sample]:
    """Batches of this process's share of a test set, with ground truth if ``annotated``."""
    return build_test_loader(
        dataset,
        **config.input_arguments(cfg, train=False),
        **config.test_loader_arguments(cfg),
        share=(distributed.rank(), distributed.world_size()),
        annotated=annotated,
    )


def evaluate_all(
    cfg: CfgNode, detector: Detector, datasets: Sequence[CocoDataset], output_dir: Path
) -> dict[str, Any]:
    """Evaluate a detector on data sets, see :func:`cascade_det.engine.evaluate.by_dataset`."""

    def evaluate_one(dataset: CocoDataset, folder: Path) -> dict[str, Any]:
        return evaluate_dataset(
            detector,
            test_loader(cfg, dataset),
            dataset,
            folder,
            detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
            fast_ap=cfg.CASCADE.FAST_AP,
            flops=region_flops(detector.roi_heads, detector.backbone.out_channels),
            further=[
                *shadow_evaluators(**config.shadow_arguments(cfg)),
                *lvis_evaluators(cfg, dataset),
            ],
            settings=config.settings(cfg),
        )

    return by_dataset(datasets, output_dir, evaluate_one)


def with_augmentation(
    cfg: CfgNode, detector: Detector, datasets: Sequence[CocoDataset], results: Mapping[str, Any]
) -> dict[str, Any]:
    """Evaluate also with test-time augmentation, if ``TEST.AUG.ENABLED``.

    See :func:`cascade_det.engine.evaluate.add_augmented`.
    """
    if (views := config.augmentation_arguments(cfg)) is None:
        return dict(results)
    augmented = AugmentedDetector(detector, **views)

    def evaluate_one(dataset: CocoDataset) -> dict[str, Any]:
        coco = CocoEvaluator(
            ground_truth=dataset.ground_truth,
            category_ids=dataset.category_ids,
            detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        )
        found = run_inference(augmented, test_loader(cfg, dataset), [coco])
        return {task: found[task] for task in ("bbox", "segm", "boundary") if task in found}

    return add_augmented(results, datasets, Path(cfg.OUTPUT_DIR), evaluate_one)

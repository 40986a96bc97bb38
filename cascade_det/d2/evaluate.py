"""The evaluation of a configuration in Detectron2: by its ``COCOEvaluator`` and by ours."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    inference_on_dataset,
    verify_results,
)
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from torch import nn

from cascade_det import config
from cascade_det.core import DetectorOutput
from cascade_det.d2.checkpoint import Checkpointer
from cascade_det.d2.datasets import register_dataset
from cascade_det.d2.detector import Detector
from cascade_det.data.coco import CocoDataset
from cascade_det.engine import distributed
from cascade_det.engine.datasets import check_trained_classes, load_datasets
from cascade_det.engine.devices import on_its_device, set_backends
from cascade_det.engine.evaluate import by_dataset, evaluate_dataset
from cascade_det.engine.run_info import run_of
from cascade_det.engine.weight_addresses import local_path
from cascade_det.errors import ConfigError

logger = logging.getLogger(__name__)


def evaluate(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Evaluate the weights of a configuration on ``DATASETS.TEST``.

    Args, results and errors are those of :func:`cascade_det.standalone.evaluate`; the box AP is
    Detectron2's, and masks and keypoints have theirs beside it (``segm``, ``keypoints``).
    """
    datasets = load_datasets(cfg, train=False, find=register_dataset)
    if not datasets:
        raise ConfigError("DATASETS.TEST is empty: name a data set to evaluate on")
    set_backends(cfg)
    model = build_model(on_its_device(cfg))
    if not cfg.MODEL.WEIGHTS and not resume:
        raise ConfigError("MODEL.WEIGHTS is empty: give the file of weights to evaluate")
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR)
    rest = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    run = rest.get("run", {}) if resume else run_of(local_path(cfg.MODEL.WEIGHTS))
    for dataset in datasets:
        check_trained_classes(run, dataset)
    results = evaluate_all(cfg, model, datasets)
    if cfg.TEST.AUG.ENABLED:
        results = {**results, **evaluate_augmented(cfg, model)}
    if cfg.TEST.EXPECTED_RESULTS and distributed.is_main():
        verify_results(cfg, results)
    return results


def evaluate_all(cfg: CfgNode, model: nn.Module, datasets: Sequence[CocoDataset]) -> dict[str, Any]:
    """Evaluate a model on data sets, see :func:`cascade_det.engine.evaluate.by_dataset`."""
    detector = Detector(model)
    if not detector.has_stages:
        logger.info(
            "The model has none of our heads: no figures per stage. MODEL.ROI_HEADS.NAME "
            "EarlyExitCascadeROIHeads is a cascade that has them."
        )
    has_others = cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON

    def evaluate_one(dataset: CocoDataset, folder: Path) -> dict[str, Any]:
        name = dataset.source.name
        loader = build_detection_test_loader(
            cfg, name, batch_size=config.test_loader_arguments(cfg)["images_per_batch"]
        )
        # One of the two writes the detections: who has more to say about them.
        own = COCOEvaluator(name, output_dir=str(folder / "inference") if has_others else None)
        own.reset()

        def finish(results: dict[str, Any]) -> Mapping[str, Any]:
            return {**results, **distributed.broadcast(own.evaluate())}

        return evaluate_dataset(
            detector,
            loader,
            dataset,
            folder,
            device=next(model.parameters()).device,
            stages=detector.has_stages,
            further=[_Feed(own, detector)],
            finish=finish,
        )

    return by_dataset(datasets, Path(cfg.OUTPUT_DIR), evaluate_one)


def evaluate_augmented(cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
    """AP with Detectron2's test-time augmentation (``TEST.AUG``), as ``bbox_TTA`` and so on."""
    augmented = GeneralizedRCNNWithTTA(cfg, model)
    results: dict[str, Any] = {}
    for name in cfg.DATASETS.TEST:
        loader = build_detection_test_loader(cfg, name)
        found = inference_on_dataset(augmented, loader, COCOEvaluator(name))
        figures = {f"{task}_TTA": value for task, value in distributed.broadcast(found).items()}
        results |= figures if len(cfg.DATASETS.TEST) == 1 else {f"{name}_TTA": figures}
    logger.info("With test-time augmentation: %s", results)
    return results


class _Feed:
    """Hands a model's own outputs to an evaluator of Detectron2, which gathers them itself."""

    def __init__(self, evaluator: DatasetEvaluator, detector: Detector) -> None:
        self._evaluator = evaluator
        self._detector = detector

    def process(self, batch: list[dict[str, Any]], output: DetectorOutput) -> None:
        self._evaluator.process(batch, self._detector.outputs)

    def state(self) -> None:
        return None

    def merge(self, states: Sequence[None]) -> None:
        pass

    def evaluate(self) -> dict[str, Any]:
        return {}

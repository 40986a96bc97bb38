"""Evaluation of a model of Detectron2, by its ``COCOEvaluator`` and by our evaluators."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    inference_on_dataset,
    verify_results,
)
from detectron2.modeling import GeneralizedRCNN, GeneralizedRCNNWithTTA, build_model
from pycocotools.coco import COCO
from torch import nn

from cascade_det import config
from cascade_det.core import DetectorOutput
from cascade_det.core.modes import evaluation_mode
from cascade_det.d2.checkpoint import Checkpointer
from cascade_det.d2.datasets import refuse_left_out, register_dataset, without_maskless
from cascade_det.d2.detector import Detector
from cascade_det.d2.loader import build_test_loader
from cascade_det.d2.optimize import optimize
from cascade_det.d2.roi_heads import EarlyExitCascadeROIHeads
from cascade_det.data.coco import CocoDataset
from cascade_det.data.samples import Batch, Sample
from cascade_det.engine.class_frequencies import lvis_evaluators
from cascade_det.engine.datasets import images_to_optimise_with, load_datasets_to_evaluate
from cascade_det.engine.devices import on_its_device, set_backends
from cascade_det.engine.evaluate import add_augmented, by_dataset, evaluate_dataset
from cascade_det.engine.head_flops import region_flops
from cascade_det.engine.run_lock import alone_in_output_dir
from cascade_det.engine.run_weights import load_to_evaluate
from cascade_det.errors import ConfigError
from cascade_det.evaluation import RegionFlops
from cascade_det.evaluation.average_precision import detections_limit, with_ap90
from cascade_det.evaluation.ground_truth import class_labels, load_mask_truth
from cascade_det.monitoring.shadow import shadow_evaluators
from cascade_det.parallel import distributed

logger = logging.getLogger(__name__)


@alone_in_output_dir
def evaluate(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Evaluate the weights of a configuration on ``DATASETS.TEST``.

    Args, results and errors as in :func:`cascade_det.standalone.evaluate`. Detectron2 computes the
    box AP, and adds ``segm`` and ``keypoints`` for models with masks and keypoints.
    """
    model, datasets = load_model(cfg, resume=resume)
    results = evaluate_all(cfg, model, datasets)
    if cfg.TEST.AUG.ENABLED:
        results = with_augmentation(cfg, model, datasets, results)
    check_expected(cfg, results)
    return results


def load_model(cfg: CfgNode, *, resume: bool = False) -> tuple[nn.Module, list[CocoDataset]]:
    """The model with its weights, and ``DATASETS.TEST``; arguments and errors as ``evaluate``.

    The model is optimised if ``MODEL.CASCADE.FAST.ENABLED``.
    """
    datasets = load_datasets_to_evaluate(without_maskless(cfg), register_dataset, resume=resume)
    refuse_left_out(datasets)
    set_backends(cfg)
    model = build_model(on_its_device(cfg))
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR)
    load_to_evaluate(checkpointer, cfg, datasets, resume=resume)
    if (fast := config.fast_arguments(cfg)) is not None and isinstance(model, GeneralizedRCNN):
        if fast.pop("compile"):
            logger.info("MODEL.CASCADE.FAST.COMPILE is for the standalone host: nothing compiles.")
        optimize(model, **fast, images=_images(cfg, model))
    return model, datasets


def _images(cfg: CfgNode, model: GeneralizedRCNN) -> list[Batch] | None:
    count, heads = cfg.MODEL.CASCADE.FAST.IMAGES, model.roi_heads
    if count and not isinstance(heads, EarlyExitCascadeROIHeads):
        raise ConfigError(
            f"MODEL.CASCADE.FAST.IMAGES is {count}, but types are chosen by images only for "
            f"models with EarlyExitCascadeROIHeads, and this one has {type(heads).__name__}. Set "
            "it to 0, and MODEL.CASCADE.FAST.DTYPE to another type than int8."
        )
    return images_to_optimise_with(cfg, register_dataset)


def evaluate_all(cfg: CfgNode, model: nn.Module, datasets: Sequence[CocoDataset]) -> dict[str, Any]:
    """Evaluate a model on data sets, see :func:`cascade_det.engine.evaluate.by_dataset`."""
    detector = Detector(model)
    if not detector.has_stages:
        logger.info(
            "The model does not use our heads: no metrics per stage, no shadow runs. "
            "MODEL.ROI_HEADS.NAME EarlyExitCascadeROIHeads is a cascade that has them."
        )
    has_others = cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON

    def evaluate_one(dataset: CocoDataset, folder: Path) -> dict[str, Any]:
        name = dataset.source.name
        loader = build_test_loader(cfg, name)
        # Our evaluator writes the detections, unless only Detectron2's has masks and keypoints.
        coco = coco_evaluator(cfg, name, folder / "inference" if has_others else None)
        coco.reset()

        def finish(results: dict[str, Any]) -> Mapping[str, Any]:
            found = dict(distributed.broadcast(coco.evaluate()))
            for task in found.keys() & results.keys():
                # Without any detection it reports nan, although the AP is 0.
                if all(math.isnan(value) for value in found[task].values()):
                    del found[task]
                else:
                    found[task] = with_ap90(found[task], results[task]["AP90"])
            return {**results, **found}

        shadow = shadow_evaluators(**config.shadow_arguments(cfg)) if detector.has_stages else []
        return evaluate_dataset(
            detector,
            loader,
            dataset,
            folder,
            detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
            stages=detector.has_stages,
            fast_ap=cfg.CASCADE.FAST_AP,
            flops=_flops(detector),
            further=[
                *shadow,
                *lvis_evaluators(cfg, dataset, register_dataset),
                _FeedOutputs(coco, detector),
            ],
            finish=finish,
            settings=config.settings(cfg),
        )

    return by_dataset(datasets, Path(cfg.OUTPUT_DIR), evaluate_one)


def with_augmentation(
    cfg: CfgNode, model: nn.Module, datasets: Sequence[CocoDataset], results: Mapping[str, Any]
) -> dict[str, Any]:
    """Evaluate also with Detectron2's test-time augmentation (``TEST.AUG``).

    See :func:`cascade_det.engine.evaluate.add_augmented`.
    """
    augmented = GeneralizedRCNNWithTTA(cfg, model)

    def evaluate_one(dataset: CocoDataset) -> Mapping[str, Any]:
        name = dataset.source.name
        loader, evaluator = build_test_loader(cfg, name), coco_evaluator(cfg, name)
        with evaluation_mode(model):
            return distributed.broadcast(inference_on_dataset(augmented, loader, evaluator))

    return add_augmented(results, datasets, Path(cfg.OUTPUT_DIR), evaluate_one)


def coco_evaluator(cfg: CfgNode, name: str, output_dir: Path | None = None) -> COCOEvaluator:
    """Detectron2's evaluator of a data set; fills in missing entries of its json.

    These are ``iscrowd`` (0), ``area`` (of the box) and ``num_keypoints`` (the visible ones).

    Args:
        cfg: a configuration.
        name: of a registered data set.
        output_dir: folder for the detections; ``None`` to write none.
    """
    evaluator = _Evaluator(
        name,
        output_dir=None if output_dir is None else str(output_dir),
        max_dets_per_image=detections_limit(cfg.TEST.DETECTIONS_PER_IMAGE),
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
    )
    for annotation in evaluator._coco_api.dataset.get("annotations", ()):
        annotation.setdefault("iscrowd", 0)
        if annotation.get("area") is None:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        visible = [flag for flag in annotation.get("keypoints", ())[2::3] if flag > 0]
        annotation.setdefault("num_keypoints", len(visible))
        if isinstance(polygons := annotation.get("segmentation"), list):
            # pycocotools fails at those that the readers of data leave out.
            good = [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]
            annotation["segmentation"] = good
    return evaluator


def check_expected(cfg: CfgNode, results: Mapping[str, Any]) -> None:
    """Compare results with ``TEST.EXPECTED_RESULTS``, as Detectron2 does.

    Raises:
        ConfigError: a task is expected that was not evaluated.
        SystemExit: results differ; in the main process, with status 1, after they are logged.
    """
    # A training that was complete before this start has no results.
    expected = cfg.TEST.EXPECTED_RESULTS if results else []
    if unknown := {task for task, *_ in expected} - results.keys():
        raise ConfigError(
            f"TEST.EXPECTED_RESULTS names {', '.join(sorted(unknown))}, but the results are of "
            f"{', '.join(results)}"
        )
    if expected and distributed.is_main():
        verify_results(cfg, results)


def _flops(detector: Detector) -> RegionFlops | None:
    """FLOPs of the box heads per region; ``None`` for heads that cannot be traced."""
    if not detector.has_stages:
        return None
    model: Any = detector.model
    maps = model.backbone.output_shape()
    try:
        return region_flops(detector.cascade, maps[model.roi_heads.box_in_features[0]].channels)
    # Tracing of a user's own box head may fail in many ways.
    except Exception as error:
        logger.info("No FLOPs of the heads: they cannot be traced (%s).", error)
        return None


class _Evaluator(COCOEvaluator):
    """Labels classes as our evaluators do, so that classes of the same name keep their AP.

    Where objects have no mask, AP of masks leaves them out, as ours does (see
    ``load_mask_truth``): Detectron2 would fail.
    """

    _coco_api: COCO
    _tasks: set[str] | None

    def _eval_predictions(
        self, predictions: list[dict[str, Any]], img_ids: list[int] | None = None
    ) -> None:
        truth = self._coco_api
        found = set(self._tasks_from_predictions([x for p in predictions for x in p["instances"]]))
        objects = truth.dataset.get("annotations", ())
        if "segm" not in found or all(x.get("segmentation") for x in objects):
            super()._eval_predictions(predictions, img_ids)
            return
        self._tasks = found - {"segm"}
        # It changes the predictions.
        super()._eval_predictions(copy.deepcopy(predictions), img_ids)
        self._tasks, self._coco_api = {"segm"}, load_mask_truth(truth.dataset)
        super()._eval_predictions(predictions, img_ids)
        self._tasks, self._coco_api = None, truth

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: Sequence[str] | None = None
    ) -> dict[str, float]:
        ids = sorted(self._coco_api.cats)
        if class_names is not None and len(class_names) == len(ids):
            named = {key: {"name": name} for key, name in zip(ids, class_names, strict=True)}
            class_names = list(class_labels(named).values())
        metrics: dict[str, float] = super()._derive_coco_results(coco_eval, iou_type, class_names)
        return metrics


class _FeedOutputs:
    """Passes the model's own outputs to an evaluator of Detectron2, which gathers them itself."""

    def __init__(self, evaluator: DatasetEvaluator, detector: Detector) -> None:
        self._evaluator = evaluator
        self._detector = detector

    def process(self, batch: Sequence[Sample], output: DetectorOutput) -> None:
        self._evaluator.process(batch, self._detector.outputs)

    def state(self) -> None:
        return None

    def merge(self, states: Sequence[None]) -> None:
        pass

    def evaluate(self) -> dict[str, Any]:
        return {}

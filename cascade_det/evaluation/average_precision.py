"""COCO average precision by pycocotools."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cascade_det.evaluation.ground_truth import class_labels, stdout_to_log

logger = logging.getLogger(__name__)

MAX_DETECTIONS = 100  # Per class and image, by COCO's rules.

# Indices of IoU 0.50, 0.55, ..., 0.95.
_IOUS = {"AP": slice(None), "AP50": slice(0, 1), "AP75": slice(5, 6), "AP90": slice(8, 9)}


def detections_limit(detections_per_image: int) -> int:
    """How many detections count per class and image: COCO's limit or the detector's, if higher."""
    return max(MAX_DETECTIONS, detections_per_image)


def coco_ap(
    coco_gt: COCO,
    results: Sequence[Mapping[str, Any]],
    image_ids: Collection[int],
    **options: Any,
) -> dict[str, float]:
    """Average precision in percent; see ``run_cocoeval``, also for options, and ``ap_metrics``."""
    return ap_metrics(run_cocoeval(coco_gt, results, image_ids, **options))


def run_cocoeval(
    coco_gt: COCO,
    results: Sequence[Mapping[str, Any]],
    image_ids: Collection[int],
    *,
    task: str = "bbox",
    max_detections: int = MAX_DETECTIONS,
    fast: bool = False,
    frequencies: Mapping[int, str] | None = None,
) -> COCOeval:
    """Evaluate and accumulate with pycocotools, or with ``faster-coco-eval``.

    Args:
        coco_gt: ground truth, see ``load_ground_truth``, or ``load_mask_truth`` for masks.
        results: detections in COCO's result format (``image_id``, ``category_id``, ``bbox``
            as XYWH, ``score``); not changed. May be empty: AP is then 0, not nan. Their ids in
            ``cocoDt`` are 1, 2, ... For masks, only those with a ``segmentation`` (compressed
            RLE) count.
        image_ids: images to evaluate on.
        task: what to match: ``bbox``, ``segm`` (masks), or ``boundary`` (masks and their
            boundaries, by Boundary IoU, arXiv 2103.16562, section 4; needs ``faster-coco-eval``).
        max_detections: how many count per class and image, best score first.
        fast: use ``faster-coco-eval``: the same precision, but no matches to analyse.
        frequencies: with ``fast``: evaluate as LVIS does, see ``class_frequency``; one of its
            frequencies for each category id.
    """
    with stdout_to_log():
        detected = _as_coco(coco_gt, results, with_masks=task != "bbox")
        if fast or task == "boundary":
            evaluation = _fast_evaluation(coco_gt, detected, task, frequencies)
        else:
            evaluation = COCOeval(coco_gt, detected, task)
        evaluation.params.imgIds = list(image_ids)
        evaluation.params.maxDets = [max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def has_fast_cocoeval() -> bool:
    """Whether ``faster-coco-eval`` is installed."""
    return find_spec("faster_coco_eval") is not None


def ap_metrics(evaluation: COCOeval) -> dict[str, float]:
    """AP, AP50, AP75, AP90, APs, APm, APl and ``AP-<label>`` of each class, in percent.

    A metric without ground truth is nan. Labels are those of ``ground_truth.class_labels``.
    """
    precision = _precision(evaluation)
    metrics = {name: mean_precision(precision[ious]) for name, ious in _IOUS.items()}
    for area, label in enumerate(evaluation.params.areaRngLbl):
        if label != "all":
            metrics[f"AP{label[0]}"] = mean_precision(_precision(evaluation, area))
    labels = class_labels(evaluation.cocoGt.cats)
    for category_id, of_class in ap_per_class(evaluation).items():
        metrics[f"AP-{labels[category_id]}"] = of_class["AP"]
    return metrics


def ap_per_class(evaluation: COCOeval) -> dict[int, dict[str, float]]:
    """``AP``, ``AP50`` and ``AP75`` in percent, by category id; nan without ground truth."""
    precision = _precision(evaluation)
    return {
        category_id: {
            name: mean_precision(precision[_IOUS[name], :, index])
            for name in ("AP", "AP50", "AP75")
        }
        for index, category_id in enumerate(evaluation.params.catIds)
    }


def with_ap90(metrics: Mapping[str, float], ap90: float) -> dict[str, float]:
    """Insert AP90 after AP75."""
    before = {name: metrics[name] for name in ("AP", "AP50", "AP75") if name in metrics}
    return {**before, "AP90": ap90, **metrics}


def _precision(evaluation: COCOeval, area: int = 0) -> np.ndarray:
    """``[IoU, recall, category]`` of objects of all sizes or one; -1 without ground truth."""
    precision: np.ndarray = evaluation.eval["precision"][:, :, :, area, -1]
    return precision


def _as_coco(coco_gt: COCO, results: Sequence[Mapping[str, Any]], *, with_masks: bool) -> COCO:
    # COCO.loadRes() would do, but it fails on an empty list and writes into the results.
    if with_masks:
        results = [result for result in results if "segmentation" in result]
    coco = COCO()
    coco.dataset = {
        "images": coco_gt.dataset["images"],
        "categories": coco_gt.dataset["categories"],
        "annotations": [
            {**result, "id": number, "area": _area(result, with_masks), "iscrowd": 0}
            for number, result in enumerate(results, start=1)
        ],
    }
    coco.createIndex()
    return coco


def _area(result: Mapping[str, Any], with_masks: bool) -> float:
    if with_masks:
        return float(coco_mask.area(result["segmentation"]))
    _, _, width, height = result["bbox"]
    return float(width * height)


def _fast_evaluation(
    coco_gt: COCO, detected: COCO, task: str, frequencies: Mapping[int, str] | None
) -> Any:
    from faster_coco_eval import COCO as FasterCOCO
    from faster_coco_eval import COCOeval_faster

    # It writes into the annotations.
    truth, found = (
        {**coco.dataset, "annotations": [*map(dict, coco.dataset["annotations"])]}
        for coco in (coco_gt, detected)
    )
    if frequencies is not None:
        truth["categories"] = [
            {**category, "frequency": frequencies[category["id"]]}
            for category in truth["categories"]
        ]
    return COCOeval_faster(
        FasterCOCO(truth),
        FasterCOCO(found),
        task,
        print_function=logger.debug,
        lvis_style=frequencies is not None,
    )


def mean_precision(precision: np.ndarray) -> float:
    """Mean in percent of what is not -1, which marks classes without objects; nan of nothing."""
    valid = precision[precision > -1]
    return float(valid.mean()) * 100 if valid.size else float("nan")

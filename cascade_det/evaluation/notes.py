"""Why an AP is 0 or nan, in words."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

# COCO's sizes by the area of the object in square pixels, both ends included.
_SIZES = {
    "APs": ("small", "up to 32 x 32 px", 0.0, 32.0**2),
    "APm": ("medium-sized", "32 x 32 to 96 x 96 px", 32.0**2, 96.0**2),
    "APl": ("large", "from 96 x 96 px", 96.0**2, 1e10),
}
_MAX_NAMES = 10


def explain(
    results: Mapping[str, float],
    coco_gt: COCO,
    predictions: Sequence[Mapping[str, Any]],
    image_ids: Collection[int] | None = None,
) -> list[str]:
    """Say for every figure that is nan, and for an AP of 0, where it comes from.

    Args:
        results: what ``coco_ap`` returned.
        coco_gt: the ground truth that it was computed with.
        predictions: the detections that it was computed from, in COCO's result format.
        image_ids: the images that it was computed on; ``None`` for all.

    Returns:
        One sentence or two per finding, for people. Empty where nothing needs explaining.
    """
    images = set(coco_gt.imgs if image_ids is None else image_ids)
    objects = [
        annotation
        for annotation in coco_gt.dataset.get("annotations", [])
        if annotation["image_id"] in images
        and annotation["category_id"] in coco_gt.cats
        and not annotation["iscrowd"]
    ]
    if not objects:
        return [
            f"Every AP is nan: the {len(images)} images evaluated have no ground truth "
            "(apart from crowd regions)."
        ]
    predictions = [item for item in predictions if item["image_id"] in images]
    return [
        *_missing_sizes(results, objects),
        *_missing_classes(results, coco_gt, objects),
        *_useless_predictions(results, coco_gt, objects, predictions),
    ]


def unprocessed_note(image_ids: Iterable[int], seen: Collection[int]) -> list[str]:
    """A note where some of the evaluated images never went through the detector."""
    missing = [image_id for image_id in image_ids if image_id not in seen]
    if not missing:
        return []
    return [
        f"{len(missing)} images of the json were not processed (ids {_enumerate(missing)}): "
        "their objects count as missed."
    ]


def _missing_sizes(results: Mapping[str, float], objects: list[dict]) -> list[str]:
    return [
        f"{key} is nan: the ground truth has no {size} object ({extent})."
        for key, (size, extent, least, most) in _SIZES.items()
        if math.isnan(results[key]) and not any(least <= item["area"] <= most for item in objects)
    ]


def _missing_classes(results: Mapping[str, float], coco_gt: COCO, objects: list[dict]) -> list[str]:
    present = {item["category_id"] for item in objects}
    names = [
        category["name"]
        for category_id, category in coco_gt.cats.items()
        if category_id not in present and math.isnan(results.get(f"AP-{category['name']}", 0.0))
    ]
    if not names:
        return []
    return [f"AP is nan for classes without ground truth: {_enumerate(names)}."]


def _useless_predictions(
    results: Mapping[str, float],
    coco_gt: COCO,
    objects: list[dict],
    predictions: Sequence[Mapping[str, Any]],
) -> list[str]:
    if not predictions:
        return [
            "AP is 0: there are no detections at all. No score reached "
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST: train longer, check MODEL.WEIGHTS, or lower it."
        ]
    lines = _foreign_categories(coco_gt, predictions)
    if results["AP50"] == 0:
        lines += _wrong_place_or_class(objects, predictions)
    predicted = {item["category_id"] for item in predictions}
    present = {item["category_id"] for item in objects}
    silent = [coco_gt.cats[key]["name"] for key in sorted(present - predicted)]
    if silent:
        lines.append(f"AP is 0 for classes that were never predicted: {_enumerate(silent)}.")
    return lines


def _foreign_categories(coco_gt: COCO, predictions: Sequence[Mapping[str, Any]]) -> list[str]:
    foreign = [
        item["category_id"] for item in predictions if item["category_id"] not in coco_gt.cats
    ]
    if not foreign:
        return []
    return [
        f"{len(foreign)} of {len(predictions)} detections have category ids that the json does "
        f"not define ({_enumerate(sorted(set(foreign)))}; it defines "
        f"{_enumerate(sorted(coco_gt.cats))}) and count for nothing: the class list of the "
        "model and the json do not belong together."
    ]


def _wrong_place_or_class(
    objects: list[dict], predictions: Sequence[Mapping[str, Any]]
) -> list[str]:
    best, best_of_class = _best_overlaps(objects, predictions)
    if best < 0.5:
        return [
            f"AP50 is 0: none of the {len(predictions)} detections overlaps an object by "
            f"IoU 0.5 (the best reaches {best:.2f}). The model is untrained, or its boxes and "
            "the annotations are in pixels of different image sizes."
        ]
    if best_of_class < 0.5:
        return [
            f"AP50 is 0: detections overlap objects (IoU up to {best:.2f}), but never one of "
            "their own class. The order of the classes and the category ids do not match."
        ]
    return []


def _best_overlaps(
    objects: list[dict], predictions: Sequence[Mapping[str, Any]]
) -> tuple[float, float]:
    """The highest IoU of any detection with any object, and with one of its own class."""
    objects_of, predictions_of = _by_image(objects), _by_image(predictions)
    best = best_of_class = 0.0
    for image_id in objects_of.keys() & predictions_of.keys():
        found, wanted = predictions_of[image_id], objects_of[image_id]
        overlap = coco_mask.iou(
            np.array([item["bbox"] for item in found], dtype=np.float64),
            np.array([item["bbox"] for item in wanted], dtype=np.float64),
            [0] * len(wanted),
        )
        same_class = np.equal.outer(
            [item["category_id"] for item in found], [item["category_id"] for item in wanted]
        )
        best = max(best, float(overlap.max()))
        best_of_class = max(best_of_class, float((overlap * same_class).max()))
    return best, best_of_class


def _by_image(items: Iterable[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    groups = defaultdict(list)
    for item in items:
        groups[item["image_id"]].append(item)
    return groups


def _enumerate(names: Sequence[object]) -> str:
    shown = ", ".join(str(name) for name in names[:_MAX_NAMES])
    return shown if len(names) <= _MAX_NAMES else f"{shown} and {len(names) - _MAX_NAMES} more"

"""Warnings that explain an AP that is 0, nan or meaningless."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from cascade_det.evaluation.ground_truth import by_image, class_labels
from cascade_det.report.tables import shown_name
from cascade_det.text import listed

# COCO's sizes by the area of the object in square pixels, both ends included.
_SIZES = {
    "APs": ("small", "up to 32 x 32 px", 0.0, 32.0**2),
    "APm": ("medium-sized", "32 x 32 to 96 x 96 px", 32.0**2, 96.0**2),
    "APl": ("large", "from 96 x 96 px", 96.0**2, 1e10),
}
_MAX_NAMES = 10
# The largest share of objects with an impossible area; a few of them change no AP.
_MOST_WRONG_AREAS = 0.01
# The smallest share of detections beyond their image; a correct detector has none.
_SHARE_BEYOND = 0.25


def explain(
    results: Mapping[str, float],
    coco_gt: COCO,
    predictions: Sequence[Mapping[str, Any]],
    image_ids: Collection[int],
) -> list[str]:
    """Explain every metric that is nan, an AP of 0, and APs that mean nothing.

    Args:
        results: see ``coco_ap``.
        coco_gt: the ground truth of the evaluation.
        predictions: its detections, in COCO's result format.
        image_ids: its images.

    Returns:
        A sentence or two per finding.
    """
    images = set(image_ids)
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
        *_equal_names(coco_gt),
        *(list(_wrong_areas(objects)) or _missing_sizes(results, objects)),
        *_missing_classes(results, coco_gt, objects),
        *_useless_predictions(results, coco_gt, objects, predictions),
        *_equal_scores(predictions),
        *_corners_as_sizes(coco_gt, predictions),
    ]


def missing_masks(
    coco_gt: COCO, predictions: Sequence[Mapping[str, Any]], image_ids: Collection[int]
) -> Iterator[str]:
    """Warnings about objects and detections without masks.

    Args:
        coco_gt: the ground truth as it was read, see ``load_ground_truth``.
        predictions: its detections, in COCO's result format.
        image_ids: the evaluated images.
    """
    images = set(image_ids)
    objects, detections = (
        [item for item in items if item["image_id"] in images]
        for items in (coco_gt.dataset.get("annotations", []), predictions)
    )
    if maskless := sum(not item.get("segmentation") for item in objects):
        yield (
            f"{maskless:,} of {len(objects):,} annotations have no mask: mask AP leaves them out, "
            "and the detections inside their boxes."
        )
    if maskless := sum("segmentation" not in item for item in detections):
        yield (
            f"{maskless:,} of {len(detections):,} detections have no mask, and do not count for "
            "mask AP."
        )


def unprocessed_warning(image_ids: Iterable[int], seen: Collection[int]) -> list[str]:
    """A warning if some of the evaluated images were not processed."""
    missing = [image_id for image_id in image_ids if image_id not in seen]
    if not missing:
        return []
    return [
        f"{len(missing)} images of the json were not processed (ids {_enumerate(missing)}): "
        "their objects count as missed."
    ]


def too_many_objects_warning(
    coco_gt: COCO, image_ids: Collection[int], most: int, option: str, *, of_class: bool = False
) -> list[str]:
    """A warning if images have more objects than detections that count.

    Args:
        coco_gt: the ground truth.
        image_ids: the evaluated images.
        most: the number of detections that count in an image.
        option: sets this number.
        of_class: whether the number is per class.
    """
    images = set(image_ids)
    counts = Counter(
        (item["image_id"], item["category_id"] if of_class else None)
        for item in coco_gt.dataset.get("annotations", [])
        if item["image_id"] in images and not item["iscrowd"]
    )
    crowded = {image_id for (image_id, _), count in counts.items() if count > most}
    if not crowded:
        return []
    (image_id, _), highest = counts.most_common(1)[0]
    kind = "objects of a class" if of_class else "objects"
    name = shown_name(coco_gt.imgs[image_id].get("file_name", ""))
    return [
        f"{len(crowded)} images have more than {most} {kind}, up to {highest:,} "
        f"({name or f'id {image_id}'}), but only the {most} best detections of an image count: "
        f"even a perfect detector misses the other objects. Raise {option}."
    ]


def _equal_names(coco_gt: COCO) -> Iterator[str]:
    labels = class_labels(coco_gt.cats)
    several = [label for key, label in labels.items() if label != coco_gt.cats[key]["name"]]
    if several:
        yield (
            "Categories of the json have the same name. Each keeps its own AP: "
            f"{_enumerate(several)}."
        )


def _wrong_areas(objects: list[dict]) -> Iterator[str]:
    """Areas that do not fit their boxes; an area may be that of a mask inside the box."""
    areas = np.array([item["area"] for item in objects], np.float64)
    width, height = np.array([item["bbox"][2:] for item in objects], np.float64).T
    boxes = width * height
    remedy = (
        "APs, APm and APl depend on it and mean nothing. Correct it, or remove it from the json to "
        "use the area of the box."
    )
    if len(objects) > 1 and np.ptp(areas) == 0 and np.ptp(boxes) > 0:
        yield (
            f"'area' is {areas[0]:g} for all objects, but their boxes have {boxes.min():,.0f} to "
            f"{boxes.max():,.0f} square pixels: {remedy}"
        )
        return
    # Masks lie inside their boxes; some tools count the edges of a box as pixels.
    wrong = (areas < np.minimum(boxes, 1)) | (areas > (width + 2) * (height + 2))
    if wrong.mean() > _MOST_WRONG_AREAS:
        number = int(wrong.argmax())
        yield (
            f"'area' of {wrong.sum():,} of {len(objects):,} objects does not fit their boxes (one "
            f"of {boxes[number]:,.0f} square pixels has {areas[number]:g}): {remedy}"
        )


def _equal_scores(predictions: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    scores = defaultdict(list)
    for item in predictions:
        scores[item["category_id"]].append(item["score"])
    ranked = [of_class for of_class in scores.values() if len(of_class) > 1]
    if ranked and all(min(of_class) == max(of_class) for of_class in ranked):
        yield (
            f"All detections of a class have the same score (such as {ranked[0][0]:g}): AP depends "
            "on their order in the file."
        )


def _corners_as_sizes(coco_gt: COCO, predictions: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Boxes that fit into their images only if they are XYXY."""
    sizes = {key: (image.get("width"), image.get("height")) for key, image in coco_gt.imgs.items()}
    known = [item for item in predictions if None not in sizes.get(item["image_id"], (None,))]
    if not known:
        return
    boxes = np.array([item["bbox"] for item in known], np.float64)
    corner, other = boxes[:, :2], boxes[:, 2:]
    most = np.array([sizes[item["image_id"]] for item in known], np.float64) + 1
    beyond = (corner + other > most).any(axis=1).mean()
    if beyond >= _SHARE_BEYOND and ((corner <= other) & (other <= most)).all():
        yield (
            f"{100 * beyond:.0f} % of the detections reach beyond their image, but none would as "
            "[x1, y1, x2, y2]: 'bbox' must be [x, y, width, height]."
        )


def _missing_sizes(results: Mapping[str, float], objects: list[dict]) -> Iterator[str]:
    areas = np.array([item["area"] for item in objects])
    for key, (size, extent, least, most) in _SIZES.items():
        if math.isnan(results[key]) and not ((least <= areas) & (areas <= most)).any():
            yield f"{key} is nan: the ground truth has no {size} object ({extent})."


def _missing_classes(
    results: Mapping[str, float], coco_gt: COCO, objects: list[dict]
) -> Iterator[str]:
    present = {item["category_id"] for item in objects}
    names = [
        label
        for category_id, label in class_labels(coco_gt.cats).items()
        if category_id not in present and math.isnan(results.get(f"AP-{label}", 0.0))
    ]
    if names:
        yield f"AP is nan for classes without ground truth: {_enumerate(names)}."


def _useless_predictions(
    results: Mapping[str, float],
    coco_gt: COCO,
    objects: list[dict],
    predictions: Sequence[Mapping[str, Any]],
) -> Iterator[str]:
    if not predictions:
        yield (
            "AP is 0: there are no detections at all. No score reached "
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST: train longer, check MODEL.WEIGHTS, or lower the "
            "threshold."
        )
        return
    yield from _foreign_categories(coco_gt, predictions)
    if results["AP50"] == 0:
        yield from _wrong_place_or_class(objects, predictions)
    predicted = {item["category_id"] for item in predictions}
    present = {item["category_id"] for item in objects}
    labels = class_labels(coco_gt.cats)
    silent = [labels[key] for key in sorted(present - predicted)]
    if silent:
        yield f"AP is 0 for classes that were never predicted: {_enumerate(silent)}."


def _foreign_categories(coco_gt: COCO, predictions: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    foreign = [
        item["category_id"] for item in predictions if item["category_id"] not in coco_gt.cats
    ]
    if foreign:
        yield (
            f"{len(foreign)} of {len(predictions)} detections have category ids that the json does "
            f"not define ({_enumerate(sorted(set(foreign)))}; it defines "
            f"{_enumerate(sorted(coco_gt.cats))}) and are ignored: the class list of the model "
            "does not match the json."
        )


def _wrong_place_or_class(
    objects: list[dict], predictions: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    best, best_of_class = _best_overlaps(objects, predictions)
    if best < 0.5:
        yield (
            f"AP50 is 0: none of the {len(predictions)} detections overlaps an object by "
            f"IoU 0.5 (the best reaches {best:.2f}). The model is untrained, or its boxes and "
            "the annotations are in pixels of different image sizes."
        )
    elif best_of_class < 0.5:
        yield (
            f"AP50 is 0: detections overlap objects (IoU up to {best:.2f}), but none of their own "
            "class. The order of the classes does not match the category ids."
        )


def _best_overlaps(
    objects: list[dict], predictions: Sequence[Mapping[str, Any]]
) -> tuple[float, float]:
    """The highest IoU of any detection with any object, and with one of its own class."""
    objects_of, predictions_of = by_image(objects), by_image(predictions)
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


def _enumerate(names: Sequence[object]) -> str:
    return listed([shown_name(str(name)) for name in names], _MAX_NAMES)

"""The confusion matrix of a detector."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from cascade_det.core.matching import match_greedily
from cascade_det.evaluation.average_precision import MAX_DETECTIONS
from cascade_det.evaluation.ground_truth import by_image


def confusion_matrix(
    coco_gt: COCO,
    results: Sequence[Mapping[str, Any]],
    image_ids: Collection[int],
    *,
    score_threshold: float = 0.5,
    iou_threshold: float = 0.5,
    max_detections: int = MAX_DETECTIONS,
    by_masks: bool = False,
) -> npt.NDArray[np.int64]:
    """Count the objects of each class by the class they were detected as.

    Matching is greedy in each image, over all classes together. By falling score, and in the order
    of ``results`` at equal scores, each detection takes the free object with the highest IoU, if
    that is ``iou_threshold`` or more; at equal IoUs an object of its own class, else the first one
    in the json. A detection without an object is a false positive (true class: background), unless
    ``iou_threshold`` or more of its area lies in a crowd region of its class: then it does not
    count. An object without a detection is a miss (detected class: background). Crowd regions are
    not objects.

    AP matches each class separately. Here, a detection of a wrong class takes the object away from
    one of the right class with a lower score.

    Args:
        coco_gt: ground truth, see ``load_ground_truth``.
        results: detections in COCO's result format; unknown categories do not count.
        image_ids: images to count.
        score_threshold: the lowest score that counts.
        iou_threshold: the lowest IoU of a match, above 0.
        max_detections: how many count per class and image, best score first, as for AP.
        by_masks: whether IoU and area are those of masks, with a ``load_mask_truth``; detections
            without one do not count.

    Returns:
        int64 ``[K + 1, K + 1]``: true class by detected class, both in the order of the category
        ids, with background last.
    """
    index_of = {category_id: index for index, category_id in enumerate(sorted(coco_gt.cats))}
    region = "segmentation" if by_masks else "bbox"
    known = [item for item in results if item["category_id"] in index_of and region in item]
    confident = [item for item in known if item["score"] >= score_threshold]
    best = _best(sorted(confident, key=lambda item: -item["score"]), max_detections)
    truth = coco_gt.dataset.get("annotations", [])
    known = [item for item in truth if item["category_id"] in index_of]
    detections = by_image(best)
    objects = by_image(item for item in known if not item["iscrowd"])
    crowds = by_image(item for item in known if item["iscrowd"])
    size = len(index_of) + 1
    pairs = [np.zeros((2, 0), np.int64)]
    for image_id in image_ids:
        found, wanted, crowd = (
            _regions(items.get(image_id, []), region, index_of)
            for items in (detections, objects, crowds)
        )
        pairs += _pairs(found, wanted, crowd, iou_threshold, size - 1)
    true, detected = np.concatenate(pairs, axis=1)
    return np.bincount(true * size + detected, minlength=size * size).reshape(size, size)


def _best(results: Iterable[Mapping[str, Any]], max_detections: int) -> Iterator[Mapping[str, Any]]:
    """The first results of each class in each image."""
    counts: Counter[tuple[int, int]] = Counter()
    for result in results:
        key = result["image_id"], result["category_id"]
        counts[key] += 1
        if counts[key] <= max_detections:
            yield result


@dataclass(frozen=True)
class _Regions:
    """N boxes (XYWH in pixels) or masks (RLE) of one image, and class indices int64 ``[N]``."""

    regions: list[Any]
    classes: npt.NDArray[np.int64]


def _regions(
    items: Sequence[Mapping[str, Any]], region: str, index_of: Mapping[int, int]
) -> _Regions:
    classes = np.array([index_of[item["category_id"]] for item in items], np.int64)
    return _Regions([item[region] for item in items], classes)


def _pairs(
    found: _Regions, wanted: _Regions, crowds: _Regions, iou_threshold: float, background: int
) -> list[npt.NDArray[np.int64]]:
    """True and detected classes ``[2, N]`` of the matches, misses and false positives."""
    taken = _match(found, wanted, iou_threshold)
    hit = taken >= 0
    missed = np.ones(len(wanted.classes), np.bool_)
    missed[taken[hit]] = False
    misses = wanted.classes[missed]
    alone = found.classes[~hit & ~_in_crowd(found, crowds, iou_threshold)]
    return [
        np.stack([wanted.classes[taken[hit]], found.classes[hit]]),
        np.stack([misses, np.full_like(misses, background)]),
        np.stack([np.full_like(alone, background), alone]),
    ]


def _match(found: _Regions, wanted: _Regions, iou_threshold: float) -> npt.NDArray[np.int64]:
    """The index of the object that each detection takes, -1 for none; best score first."""
    if not len(found.classes) or not len(wanted.classes):
        return np.full(len(found.classes), -1)
    ious = coco_mask.iou(found.regions, wanted.regions, [0] * len(wanted.classes))
    same_class = np.equal.outer(found.classes, wanted.classes)
    preferred = torch.from_numpy(same_class)
    (taken,) = match_greedily(torch.from_numpy(ious), [iou_threshold], preferred=preferred)
    return taken.numpy()


def _in_crowd(found: _Regions, crowds: _Regions, threshold: float) -> npt.NDArray[np.bool_]:
    if not len(found.classes) or not len(crowds.classes):
        return np.zeros(len(found.classes), np.bool_)
    # With crowd flags, an IoU is the share of the detection.
    covered = coco_mask.iou(found.regions, crowds.regions, [1] * len(crowds.classes))
    same = np.equal.outer(found.classes, crowds.classes)
    return ((covered >= threshold) & same).any(axis=1)

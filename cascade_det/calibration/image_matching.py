"""COCO's matching image by image, cached for images whose detections do not change.

I images, K classes, T IoU thresholds (COCO's 0.50, 0.55, ..., 0.95), D detections.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask
from pycocotools.cocoeval import COCOeval

from cascade_det.core.matching import match_greedily
from cascade_det.core.structures import Detections
from cascade_det.errors import DatasetError
from cascade_det.evaluation.average_precision import MAX_DETECTIONS
from cascade_det.evaluation.ground_truth import load_ground_truth

IOUS = COCOeval(iouType="bbox").params.iouThrs


@dataclass(frozen=True)
class MatchedDetections:
    """The matched detections of some images, sorted by image, class and falling score.

    Attributes:
        image_ids: int64 ``[I]`` of the json, ascending.
        images: int64 ``[D]``, ascending indices into ``image_ids``.
        classes: int64 ``[D]`` in ``[0, K)``.
        scores: float64 ``[D]``.
        exit_stages: int64 ``[D]``.
        hits: bool ``[T, D]``, whether a detection matches an object.
        ignored: bool ``[T, D]``, whether it lies in a crowd instead and does not count.
        objects: int64 ``[I, K]``, numbers of objects; no crowds.
    """

    image_ids: npt.NDArray[np.int64]
    images: npt.NDArray[np.int64]
    classes: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    exit_stages: npt.NDArray[np.int64]
    hits: npt.NDArray[np.bool_]
    ignored: npt.NDArray[np.bool_]
    objects: npt.NDArray[np.int64]


class ImageMatcher:
    """Matches the detections of an image to its objects, and caches the matches.

    Args:
        ground_truth: content of a COCO-format json with annotations, see ``load_ground_truth``.
        category_ids: its category id for each class ``0..K-1``.
        max_detections: how many count per class and image, best score first.
        cache_size: number of matched images to keep, of about 50 bytes per detection.

    Raises:
        DatasetError: the ground truth cannot be used.
    """

    def __init__(
        self,
        ground_truth: Mapping[str, Any],
        category_ids: Sequence[int],
        *,
        max_detections: int = MAX_DETECTIONS,
        cache_size: int = 100_000,
    ) -> None:
        coco = load_ground_truth(ground_truth)
        if not coco.anns:
            raise DatasetError("the ground truth has no annotations to match detections to")
        self.num_classes = len(category_ids)
        self._max_detections = max_detections
        self._objects = {
            image_id: _Objects.of(coco.imgToAnns[image_id], category_ids) for image_id in coco.imgs
        }
        self._cache: OrderedDict[tuple[int, bytes], MatchedDetections] = OrderedDict()
        self._cache_size = cache_size

    def objects_of(self, image_id: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Boxes ``[G, 4]`` (XYXY, original pixels) and classes ``[G]`` of objects; no crowds."""
        objects = self._objects[image_id]
        boxes = objects.boxes[~objects.crowds]
        boxes[:, 2:] += boxes[:, :2]
        return boxes, objects.classes[~objects.crowds]

    def match(self, image_id: int, detections: Detections) -> MatchedDetections:
        """Match the detections of an image.

        Args:
            image_id: of the json.
            detections: boxes in pixels of the original image, classes in ``[0, K)``.

        Raises:
            DatasetError: the image is not in the json, or a class has no category.
        """
        columns = [
            np.ascontiguousarray(column.detach().cpu().numpy())
            for column in (
                detections.boxes,
                detections.scores,
                detections.classes,
                detections.exit_stages,
            )
        ]
        key = image_id, hashlib.blake2b(b"".join(map(np.ndarray.tobytes, columns))).digest()
        matched = self._cache.pop(key, None) or self._match(image_id, *columns)
        self._cache[key] = matched  # Most recently used.
        if len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return matched

    def collect(self, matched: Iterable[MatchedDetections]) -> MatchedDetections:
        """Join single images; those without detections count as well.

        Raises:
            ValueError: an image is there twice.
        """
        images = sorted(matched, key=lambda of_image: of_image.image_ids[0])
        image_ids = _joined([image.image_ids for image in images], np.int64)
        if (np.diff(image_ids) == 0).any():
            raise ValueError("an image is there twice: give it a weight instead")
        none = np.zeros((len(IOUS), 0), bool)
        return MatchedDetections(
            image_ids=image_ids,
            images=np.arange(len(images)).repeat([len(image.scores) for image in images]),
            classes=_joined([image.classes for image in images], np.int64),
            scores=_joined([image.scores for image in images], np.float64),
            exit_stages=_joined([image.exit_stages for image in images], np.int64),
            hits=np.concatenate([none, *(image.hits for image in images)], axis=1),
            ignored=np.concatenate([none, *(image.ignored for image in images)], axis=1),
            objects=_joined([image.objects for image in images], np.int64).reshape(
                -1, self.num_classes
            ),
        )

    def _match(
        self,
        image_id: int,
        boxes: npt.NDArray[np.float32],
        scores: npt.NDArray[np.float32],
        classes: npt.NDArray[np.int64],
        exit_stages: npt.NDArray[np.int64],
    ) -> MatchedDetections:
        if image_id not in self._objects:
            raise DatasetError(f"image {image_id} is not in the ground truth")
        if len(classes) and not 0 <= classes.min() <= classes.max() < self.num_classes:
            raise DatasetError(
                f"image {image_id} has detections of class {classes.max()}, but there are "
                f"categories for {self.num_classes} classes"
            )
        objects = self._objects[image_id]
        by_score = np.lexsort((-scores, classes))  # Stable, as in COCOeval.
        firsts = np.searchsorted(classes[by_score], classes[by_score])
        kept = by_score[np.arange(len(classes)) - firsts < self._max_detections]
        hits, ignored = np.zeros((2, len(IOUS), len(kept)), bool)
        # Sizes are differences in float32, as in files of results.
        xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)[kept]
        xywh = xywh.astype(np.float64)
        for index in np.unique(classes[kept]).tolist():
            rows = np.flatnonzero(classes[kept] == index)
            here = objects.classes == index
            found = _match_class(xywh[rows], objects.boxes[here], objects.crowds[here])
            hits[:, rows], ignored[:, rows] = found
        counts = np.bincount(objects.classes[~objects.crowds], minlength=self.num_classes)
        return MatchedDetections(
            image_ids=np.array([image_id]),
            images=np.zeros(len(kept), np.int64),
            classes=classes[kept],
            scores=scores[kept].astype(np.float64),
            exit_stages=exit_stages[kept],
            hits=hits,
            ignored=ignored,
            objects=counts[None],
        )


@dataclass(frozen=True)
class _Objects:
    """The annotations of one image: boxes ``[G, 4]`` XYWH, classes ``[G]``, crowds bool ``[G]``."""

    boxes: npt.NDArray[np.float64]
    classes: npt.NDArray[np.int64]
    crowds: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, annotations: Iterable[Mapping[str, Any]], category_ids: Sequence[int]) -> _Objects:
        known = [item for item in annotations if item["category_id"] in category_ids]
        classes = [category_ids.index(item["category_id"]) for item in known]
        return cls(
            np.array([item["bbox"] for item in known], np.float64).reshape(-1, 4),
            np.array(classes, np.int64),
            np.array([item["iscrowd"] for item in known], bool),
        )


def _match_class(
    boxes: npt.NDArray[np.float64], truth: npt.NDArray[np.float64], crowds: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Hits and ignored, ``[T, D]``, of the boxes of one class (XYWH, best score first)."""
    hits = np.zeros((len(IOUS), len(boxes)), bool)
    if len(truth) == 0:
        return hits, hits
    ious = mask.iou(boxes, truth, crowds.astype(np.uint8))
    # Reversed: of objects with equal IoU, COCOeval takes the last one.
    reversed_ious = torch.from_numpy(ious[:, ~crowds][:, ::-1].copy())
    hits = match_greedily(reversed_ious, IOUS.tolist()).numpy() >= 0
    in_crowd = ious[:, crowds].max(axis=1, initial=0) >= IOUS[:, None]
    return hits, in_crowd & ~hits


def _joined(parts: list, dtype: npt.DTypeLike) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)

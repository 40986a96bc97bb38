"""COCO's matching image by image, cached for images whose detections do not change.

I images, K classes, T IoU thresholds (COCO's 0.50, 0.55, ..., 0.95), D detections.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask
from pycocotools.cocoeval import COCOeval

from cascade_det.calibration.mask_overlaps import MaskedObjects, MaskOverlaps
from cascade_det.core.matching import match_greedily
from cascade_det.core.record import RecordedDetections
from cascade_det.core.structures import Detections
from cascade_det.evaluation.average_precision import MAX_DETECTIONS
from cascade_det.evaluation.ground_truth import load_ground_truth, load_mask_truth

IOUS = COCOeval(iouType="bbox").params.iouThrs
# Matched images to keep, of about 50 bytes per detection.
CACHE_SIZE = 100_000
_Rows = npt.NDArray[np.int64]
_Ious = npt.NDArray[np.float64]
_Key = tuple[str, int, bytes]


class _Objects(NamedTuple):
    """The annotations of an image: boxes ``[G, 4]`` (XYWH), classes and bool crowds ``[G]``."""

    boxes: npt.NDArray[np.float64]
    classes: npt.NDArray[np.int64]
    crowds: npt.NDArray[np.bool_]


class _Columns(NamedTuple):
    """Of D detections."""

    scores: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int64]
    exit_stages: npt.NDArray[np.int64]


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
    """

    def __init__(
        self,
        ground_truth: Mapping[str, Any],
        category_ids: Sequence[int],
        *,
        max_detections: int = MAX_DETECTIONS,
    ) -> None:
        coco = load_ground_truth(ground_truth)
        self._ground_truth = ground_truth
        self._category_ids = category_ids
        self._max_detections = max_detections
        self._objects = {
            image_id: _objects(coco.imgToAnns[image_id], category_ids) for image_id in coco.imgs
        }
        self._cache: dict[_Key, MatchedDetections] = {}

    def objects_of(self, image_id: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Boxes ``[G, 4]`` (XYXY, original pixels) and classes ``[G]`` of objects; no crowds."""
        xywh, classes, crowds = self._objects[image_id]
        boxes = xywh[~crowds]
        boxes[:, 2:] += boxes[:, :2]
        return boxes, classes[~crowds]

    def masks_of(self, image_id: int) -> MaskedObjects:
        """The masks of an image's objects, crowds included."""
        return self._masks[image_id]

    @cached_property
    def _masks(self) -> dict[int, MaskedObjects]:
        coco, masks = load_mask_truth(self._ground_truth), {}
        for image_id in coco.imgs:
            items = coco.imgToAnns[image_id]
            _, classes, crowds = _objects(items, self._category_ids)
            masks[image_id] = MaskedObjects([a["segmentation"] for a in items], classes, crowds)
        return masks

    def match(self, image_id: int, detections: Detections) -> MatchedDetections:
        """Match the detections of an image.

        Args:
            image_id: of the json.
            detections: boxes in pixels of the original image, classes in ``[0, K)``.
        """
        gt_boxes, gt_classes, crowds = self._objects[image_id]
        boxes, scores, classes, exit_stages = (
            np.ascontiguousarray(column.detach().cpu().numpy())
            for column in (
                detections.boxes,
                detections.scores,
                detections.classes,
                detections.exit_stages,
            )
        )

        def ious(rows: _Rows, here: _Rows) -> _Ious:
            # Sizes are differences in float32, as in files of results.
            xywh = np.concatenate([boxes[rows, :2], boxes[rows, 2:] - boxes[rows, :2]], axis=1)
            overlaps: _Ious = mask.iou(
                xywh.astype(np.float64), gt_boxes[here], crowds[here].astype(np.uint8)
            )
            return overlaps

        columns = _Columns(scores, classes, exit_stages)
        return self._cached(
            _key("boxes", image_id, boxes, *columns),
            lambda: self._match(image_id, columns, gt_classes, crowds, ious),
        )

    def match_masks(
        self, image_id: int, detections: RecordedDetections, overlaps: MaskOverlaps
    ) -> MatchedDetections:
        """Match the masks of an image; a detection without a mask does not count.

        Args:
            image_id: of the json.
            detections: of a record; ``rows`` are those of the image alone, -1 without a mask.
            overlaps: of the image.
        """
        masked = detections[detections.rows >= 0]
        masks, gt_classes, crowds = self.masks_of(image_id)
        columns = _Columns(
            masked.scores.numpy(), masked.classes.numpy(), masked.exit_stages.numpy()
        )

        def match() -> MatchedDetections:
            of_all = overlaps.of(masked, len(masks))
            return self._match(
                image_id, columns, gt_classes, crowds, lambda rows, here: of_all[rows][:, here]
            )

        return self._cached(_key("masks", image_id, *columns, masked.rows.numpy()), match)

    def _cached(self, key: _Key, match: Callable[[], MatchedDetections]) -> MatchedDetections:
        matched = self._cache.pop(key, None) or match()
        self._cache[key] = matched  # Most recently used.
        if len(self._cache) > CACHE_SIZE:
            self._cache.pop(next(iter(self._cache)))
        return matched

    def _match(
        self,
        image_id: int,
        columns: _Columns,
        gt_classes: npt.NDArray[np.int64],
        crowds: npt.NDArray[np.bool_],
        ious: Callable[[_Rows, _Rows], _Ious],
    ) -> MatchedDetections:
        scores, classes, exit_stages = columns
        by_score = np.lexsort((-scores, classes))  # Stable, as in COCOeval.
        firsts = np.searchsorted(classes[by_score], classes[by_score])
        kept = by_score[np.arange(len(classes)) - firsts < self._max_detections]
        hits, ignored = np.zeros((2, len(IOUS), len(kept)), bool)
        for index in np.unique(classes[kept]).tolist():
            rows = np.flatnonzero(classes[kept] == index)
            here = np.flatnonzero(gt_classes == index)
            if len(here):
                found = _match_class(ious(kept[rows], here), crowds[here])
                hits[:, rows], ignored[:, rows] = found
        counts = np.bincount(gt_classes[~crowds], minlength=len(self._category_ids))
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


def join_images(matched: Iterable[MatchedDetections]) -> MatchedDetections:
    """Join single images, each there once; those without detections count as well."""
    images = sorted(matched, key=lambda of_image: of_image.image_ids[0])

    def joined(name: str, axis: int = 0) -> Any:
        return np.concatenate([getattr(image, name) for image in images], axis)

    return MatchedDetections(
        image_ids=joined("image_ids"),
        images=np.arange(len(images)).repeat([len(image.scores) for image in images]),
        classes=joined("classes"),
        scores=joined("scores"),
        exit_stages=joined("exit_stages"),
        hits=joined("hits", axis=1),
        ignored=joined("ignored", axis=1),
        objects=joined("objects"),
    )


def mix_images(
    versions: Sequence[MatchedDetections], which: npt.NDArray[np.int64]
) -> MatchedDetections:
    """Take each image from one of several detectors.

    Args:
        versions: matched detections of the same I images.
        which: ``[I]``, the index into ``versions`` for each image.
    """
    kept = [which[one.images] == index for index, one in enumerate(versions)]
    by_image = np.argsort(
        np.concatenate([one.images[k] for one, k in zip(versions, kept, strict=True)]),
        kind="stable",
    )

    def mixed(name: str) -> Any:
        columns = [getattr(one, name)[..., k] for one, k in zip(versions, kept, strict=True)]
        return np.concatenate(columns, axis=-1)[..., by_image]

    of_detections = ("images", "classes", "scores", "exit_stages", "hits", "ignored")
    return replace(versions[0], **{name: mixed(name) for name in of_detections})


def _objects(annotations: Iterable[Mapping[str, Any]], category_ids: Sequence[int]) -> _Objects:
    items = list(annotations)
    return _Objects(
        np.array([item["bbox"] for item in items], np.float64).reshape(-1, 4),
        np.array([category_ids.index(item["category_id"]) for item in items], np.int64),
        np.array([item["iscrowd"] for item in items], bool),
    )


def _key(kind: str, image_id: int, *columns: npt.NDArray[Any]) -> _Key:
    return kind, image_id, hashlib.blake2b(b"".join(map(np.ndarray.tobytes, columns))).digest()


def _match_class(
    ious: npt.NDArray[np.float64], crowds: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Hits and ignored, ``[T, D]``, of detections of one class, best score first.

    Args:
        ious: ``[D, G]``.
        crowds: ``[G]``.
    """
    # Reversed: of objects with equal IoU, COCOeval takes the last one.
    reversed_ious = torch.from_numpy(ious[:, ~crowds][:, ::-1].copy())
    hits = match_greedily(reversed_ious, IOUS.tolist()).numpy() >= 0
    in_crowd = ious[:, crowds].max(axis=1, initial=0) >= IOUS[:, None]
    return hits, in_crowd & ~hits

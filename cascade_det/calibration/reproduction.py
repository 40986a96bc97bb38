"""What early exits lose of an image, as a number in [0, 1]: a loss whose mean can be controlled."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from pycocotools import mask

from cascade_det.core.structures import Detections


def reproduction_loss(
    full: Detections,
    early: Detections,
    gt_boxes: npt.ArrayLike,
    gt_classes: npt.ArrayLike,
    *,
    score: float,
    iou: float = 0.5,
) -> float:
    """The share of the objects that the full cascade finds and the early exits do not.

    Args:
        full: what the full cascade returns for an image.
        early: what the cascade with exits returns.
        gt_boxes: ``[G, 4]``, XYXY in the frame of the detections; no crowds.
        gt_classes: ``[G]`` in ``[0, K)``.
        score: detections below it do not count.
        iou: from which overlap on a detection finds an object.

    Returns:
        In [0, 1]; 0 where the full cascade finds nothing.
    """
    found, found_early = (
        found_objects(detections, gt_boxes, gt_classes, score=score, iou=iou)
        for detections in (full, early)
    )
    return lost_share(found, found_early)


def lost_share(found: npt.NDArray[np.bool_], found_early: npt.NDArray[np.bool_]) -> float:
    """``reproduction_loss`` of what ``found_objects`` says of the full cascade and of the exits."""
    return float((found & ~found_early).sum() / max(found.sum(), 1))


def found_objects(
    detections: Detections,
    gt_boxes: npt.ArrayLike,
    gt_classes: npt.ArrayLike,
    *,
    score: float,
    iou: float = 0.5,
) -> npt.NDArray[np.bool_]:
    """Which objects are found: best score first, each detection takes the nearest free one.

    Args: as in ``reproduction_loss``.

    Returns:
        bool ``[G]``.
    """
    classes = np.asarray(gt_classes, np.int64)
    found = np.zeros(len(classes), bool)
    scores = detections.scores.cpu().numpy()
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] >= score]
    if len(order) == 0 or len(classes) == 0:
        return found
    boxes = detections.boxes.detach().cpu().numpy()[order]
    overlaps = mask.iou(_xywh(boxes), _xywh(gt_boxes), np.zeros(len(classes), np.uint8))
    overlaps[detections.classes.cpu().numpy()[order, None] != classes] = -1
    for row in overlaps[(overlaps >= iou).any(axis=1)]:
        free = np.where(found, -1, row)
        nearest = free.argmax()
        found[nearest] |= free[nearest] >= iou
    return found


def _xywh(boxes: npt.ArrayLike) -> npt.NDArray[np.float64]:
    corners = np.asarray(boxes, np.float64).reshape(-1, 4)
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)

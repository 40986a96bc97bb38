"""Which objects of an image are found, and the share of them that early exits lose.

G objects.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask

from cascade_det.calibration.mask_overlaps import MaskOverlaps
from cascade_det.core.matching import match_greedily
from cascade_det.core.record import RecordedDetections
from cascade_det.core.structures import Detections

IOUS = (0.5, 0.75)


def found_objects(
    detections: Detections, gt_boxes: npt.ArrayLike, gt_classes: npt.ArrayLike, *, score: float
) -> npt.NDArray[np.bool_]:
    """Which objects the detections of an image find.

    Best score first, each detection takes the free object of its class that overlaps it most.

    Args:
        detections: in any order.
        gt_boxes: ``[G, 4]``, XYXY in the frame of the detections; no crowds.
        gt_classes: ``[G]`` in ``[0, K)``.
        score: the lowest score that counts.

    Returns:
        bool ``[2, G]``, at each of ``IOUS``.
    """
    classes = np.asarray(gt_classes, np.int64)
    order = _by_score(detections, score)
    if len(order) == 0 or len(classes) == 0:
        return np.zeros((len(IOUS), len(classes)), bool)
    boxes = detections.boxes.detach().cpu().numpy()[order]
    ious = mask.iou(_xywh(boxes), _xywh(gt_boxes), np.zeros(len(classes), np.uint8))
    ious[detections.classes.cpu().numpy()[order, None] != classes] = -1
    return _taken(ious)


def found_masks(
    detections: RecordedDetections,
    overlaps: MaskOverlaps,
    crowds: npt.NDArray[np.bool_],
    *,
    score: float,
) -> npt.NDArray[np.bool_]:
    """Which objects the masks of an image find; as ``found_objects``, with the IoU of masks.

    Args:
        detections: of a record; ``rows`` are those of the image alone, -1 without a mask.
        overlaps: of the image, with all objects that have a mask.
        crowds: bool ``[G]``, of these objects; crowds are not found.
        score: the lowest score that counts.

    Returns:
        bool ``[2, G]``, at each of ``IOUS``.
    """
    masked = detections[detections.rows >= 0]
    ious = overlaps.of(masked[torch.from_numpy(_by_score(masked, score))], len(crowds))
    ious[:, crowds] = 0
    return _taken(ious)


def lost_shares(
    found: npt.NDArray[np.bool_], found_early: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """The share of the full cascade's found objects that early exits miss; 0 where it finds none.

    Args:
        found: bool ``[2, G]``, see ``found_objects``, of the full cascade.
        found_early: bool ``[2, G]``, with exits.

    Returns:
        float64 ``[2]``, at each of ``IOUS``.
    """
    return (found & ~found_early).sum(axis=1) / np.maximum(found.sum(axis=1), 1)


def _by_score(detections: Detections, least: float) -> npt.NDArray[np.int64]:
    scores = detections.scores.cpu().numpy()
    order = np.argsort(-scores, kind="stable")
    return order[scores[order] >= least]


def _taken(ious: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which columns of ``[D, G]`` are taken by rows, best score first: ``[2, G]``."""
    found = np.zeros((len(IOUS), ious.shape[1]), bool)
    for row, taken in zip(found, match_greedily(torch.from_numpy(ious), IOUS), strict=True):
        row[taken[taken >= 0]] = True
    return found


def _xywh(boxes: npt.ArrayLike) -> npt.NDArray[np.float64]:
    corners = np.asarray(boxes, np.float64).reshape(-1, 4)
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)

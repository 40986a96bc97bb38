"""Which objects of an image are found, and the share of them that early exits lose."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask

from cascade_det.core.matching import match_greedily
from cascade_det.core.structures import Detections


def found_objects(
    detections: Detections,
    gt_boxes: npt.ArrayLike,
    gt_classes: npt.ArrayLike,
    *,
    score: float,
    iou: float = 0.5,
) -> npt.NDArray[np.bool_]:
    """Which objects the detections of an image find.

    Best score first, each detection takes the free object of its class that overlaps it most.

    Args:
        detections: in any order.
        gt_boxes: ``[G, 4]``, XYXY in the frame of the detections; no crowds.
        gt_classes: ``[G]`` in ``[0, K)``.
        score: the lowest score that counts.
        iou: the lowest IoU of a match.

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
    ious = mask.iou(_xywh(boxes), _xywh(gt_boxes), np.zeros(len(classes), np.uint8))
    ious[detections.classes.cpu().numpy()[order, None] != classes] = -1
    (taken,) = match_greedily(torch.from_numpy(ious), [iou])
    found[taken[taken >= 0]] = True
    return found


def lost_share(found: npt.NDArray[np.bool_], found_early: npt.NDArray[np.bool_]) -> float:
    """The share of the full cascade's found objects that early exits miss; 0 where it finds none.

    Args:
        found: bool ``[G]``, see ``found_objects``, of the full cascade.
        found_early: bool ``[G]``, with exits.
    """
    return float((found & ~found_early).sum() / max(found.sum(), 1))


def _xywh(boxes: npt.ArrayLike) -> npt.NDArray[np.float64]:
    corners = np.asarray(boxes, np.float64).reshape(-1, 4)
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)

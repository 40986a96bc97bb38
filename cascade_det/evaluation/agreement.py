"""The share of the full cascade's detections that early exits lose.

Boxes are XYXY in absolute pixels of one frame; D detections of one image.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

from cascade_det.core.matching import match_greedily
from cascade_det.core.structures import Detections

MATCH_IOU = 0.5
MIN_SCORE = 0.5
# The same image in another batch gives scores that differ by rounding.
_SCORE_TOLERANCE = 1e-4


def agreement_loss(early: Detections, full: Detections, *, min_score: float = MIN_SCORE) -> float:
    """The share of the full cascade's detections in one image that early exits miss.

    The full cascade's detections with ``min_score`` or more, best first, each take the free early
    detection of their class that overlaps them most, if the IoU is at least ``MATCH_IOU``. Early
    detections count from ``min_score`` less 1e-4, for rounding. The loss is the share of the full
    cascade's detections that find none. Extra early detections cost nothing. No ground truth
    is needed.

    Args:
        early: the output with exits.
        full: the full cascade's output for the same image, in the same frame.
        min_score: in [0, 1].

    Returns:
        In [0, 1]; 0 where the full cascade detects nothing with ``min_score`` or more.
    """
    wanted = _from_score(full, min_score)
    found = _from_score(early, min_score - _SCORE_TOLERANCE)
    if not len(wanted):
        return 0.0
    (taken,) = match_greedily(_ious(wanted, found), [MATCH_IOU])
    return int((taken < 0).sum()) / len(wanted)


def _from_score(detections: Detections, min_score: float) -> Detections:
    """Detections with ``min_score`` or more, best first, on the CPU."""
    detections = detections.to("cpu")
    kept = detections[detections.scores >= min_score]
    return kept[torch.argsort(kept.scores, descending=True, stable=True)]


def _ious(wanted: Detections, found: Detections) -> Tensor:
    """IoU float64 ``[W, F]``; -1 for pairs of different classes, or where it is 0 / 0."""
    ious = box_iou(wanted.boxes.detach().double(), found.boxes.detach().double())
    same_class = wanted.classes[:, None] == found.classes
    return torch.where(same_class & ~ious.isnan(), ious, -1.0)

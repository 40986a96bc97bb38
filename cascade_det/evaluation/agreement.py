"""How much of what the full cascade finds in an image is lost by leaving early.

Boxes are XYXY in absolute pixels of one frame; D detections of one image.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

from cascade_det.core.structures import Detections

MATCH_IOU = 0.5
MIN_SCORE = 0.5
# The same image in another batch gives scores that differ by rounding.
_SCORE_TOLERANCE = 1e-4


def agreement_loss(early: Detections, full: Detections, *, min_score: float = MIN_SCORE) -> float:
    """The loss of one image: what a user who cuts at ``min_score`` misses by exits.

    The full cascade's detections from ``min_score`` on, best first, each take the detection of
    their class among the early ones that is still free and overlaps them most, by an IoU of at
    least ``MATCH_IOU``. Early detections count from ``min_score`` on as well, less 1e-4 for
    rounding. The loss is the share of the full cascade's that find none. What the exits add is no
    loss. No ground truth is needed.

    Args:
        early: what was returned with exits.
        full: what the full cascade returns for the same image, in the same frame.
        min_score: in [0, 1].

    Returns:
        In [0, 1]; 0 where the full cascade detects nothing from ``min_score`` on.
    """
    wanted = _from_score(full, min_score)
    found = _from_score(early, min_score - _SCORE_TOLERANCE)
    if not len(wanted):
        return 0.0
    overlaps = _overlaps(wanted, found)
    lost = 0
    for row in overlaps:
        if not len(found) or (best := row.max()) < MATCH_IOU:
            lost += 1
            continue
        # Taken: no other can have it.
        overlaps[:, int((row == best).nonzero()[0, 0])] = -1.0
    return lost / len(wanted)


def _from_score(detections: Detections, min_score: float) -> Detections:
    """Those from a score on, best first, on the CPU."""
    detections = detections.to("cpu")
    kept = detections[detections.scores >= min_score]
    return kept[torch.argsort(kept.scores, descending=True, stable=True)]


def _overlaps(wanted: Detections, found: Detections) -> Tensor:
    """IoU float64 ``[W, F]``; -1 for two of different classes, or where it is 0 / 0."""
    overlaps = box_iou(wanted.boxes.detach().double(), found.boxes.detach().double())
    same_class = wanted.classes[:, None] == found.classes
    return torch.where(same_class & ~overlaps.isnan(), overlaps, -1.0)

"""What early exits lose of the full cascade's detections, and other types of those in float32.

Boxes are XYXY in absolute pixels of one frame; D detections of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from cascade_det.core.matching import match_greedily
from cascade_det.core.structures import Detections

MATCH_IOU = 0.5
MIN_SCORE = 0.5
AGAIN_IOU = 0.9
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
    return int((_taken(wanted, found, MATCH_IOU) < 0).sum()) / len(wanted)


@dataclass(frozen=True)
class Agreement:
    """How many detections of one detector another one finds again, and how exactly.

    Attributes:
        wanted: number of detections to find.
        found: how many of them are found.
        shift: mean over these of the mean distance of the four coordinates, in pixels.
    """

    wanted: int
    found: int
    shift: float

    @property
    def share(self) -> float:
        """Of the wanted detections, in [0, 1]; 1 where there are none."""
        return self.found / self.wanted if self.wanted else 1.0


def find_again(
    found: Sequence[Detections],
    wanted: Sequence[Detections],
    *,
    min_score: float = MIN_SCORE,
    min_iou: float = AGAIN_IOU,
) -> Agreement:
    """Find the detections of one detector among those of another, matched as in ``agreement_loss``.

    Args:
        found: one entry per image.
        wanted: one entry per image, in the same frames; those with ``min_score`` or more count.
        min_score: in [0, 1].
        min_iou: of a match, above 0.
    """
    count, shifts = 0, [torch.empty(0)]
    for theirs, ours in zip(wanted, found, strict=True):
        theirs = _from_score(theirs, min_score)
        ours = _from_score(ours, min_score - _SCORE_TOLERANCE)
        count += len(theirs)
        taken = _taken(theirs, ours, min_iou)
        matched = taken >= 0
        shifts.append((theirs.boxes[matched] - ours.boxes[taken[matched]]).abs().mean(dim=1))
    distances = torch.cat(shifts)
    return Agreement(count, len(distances), float(distances.mean()) if len(distances) else 0.0)


def _from_score(detections: Detections, min_score: float) -> Detections:
    """Detections with ``min_score`` or more, best first, on the CPU."""
    detections = detections.to("cpu")
    kept = detections[detections.scores >= min_score]
    return kept[torch.argsort(kept.scores, descending=True, stable=True)]


def _taken(wanted: Detections, found: Detections, min_iou: float) -> Tensor:
    """int64 ``[W]``: what each wanted detection takes of those found; -1 for none."""
    (taken,) = match_greedily(_ious(wanted, found), [min_iou])
    return taken


def _ious(wanted: Detections, found: Detections) -> Tensor:
    """IoU float64 ``[W, F]``; -1 for pairs of different classes, or where it is 0 / 0."""
    ious = box_iou(wanted.boxes.detach().double(), found.boxes.detach().double())
    same_class = wanted.classes[:, None] == found.classes
    return torch.where(same_class & ~ious.isnan(), ious, -1.0)

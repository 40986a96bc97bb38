"""The rule that drops a region which a better one covers."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

from cascade_det.core.exits.view import RegionView

# The work of one NMS call grows with the square of the regions. torchvision would call it class by
# class from 1,000 on, which is slower up to about here (80 classes, 8 images, on a CPU).
MOST_IN_ONE_CALL = 10_000


class DropCovered:
    """Drops what a better region of its class and image, live or accepted, overlaps enough.

    The class is the most probable foreground class. As in the NMS at the end, what leaves covers
    nothing itself.

    Args:
        iou: the overlap from which on a region leaves, in (0, 1].
    """

    reason = "redundant"

    def __init__(self, iou: float) -> None:
        self.iou = iou

    def is_active(self, stage: int) -> bool:
        """Whether anything may leave after ``stage``: not before there are classes."""
        return stage >= 0

    def leaves(self, view: RegionView) -> Tensor:
        """Bool ``[R]``."""
        assert view.probs is not None
        classes = view.probs.shape[1] - 1
        boxes, scores = view.boxes, view.scores
        groups = view.image_index * classes + view.classes
        if view.accepted is not None:
            accepted = view.accepted
            boxes = torch.cat((boxes, accepted.boxes))
            scores = torch.cat((scores, accepted.scores))
            groups = torch.cat((groups, accepted.image_index * classes + accepted.classes))
        # In float64, so that a batch decides as its images do one by one: boxes of different
        # groups are shifted apart, and float32 would lose the fraction of a pixel. The shift is
        # the largest coordinate, which must not be NaN; what is empty covers nothing.
        boxes = boxes.double().where(boxes.isfinite(), 0.0)
        threshold = _just_below(self.iou)
        if len(boxes) <= MOST_IN_ONE_CALL:
            apart = boxes + (groups * (boxes.amax() + 1.0))[:, None]
            kept = nms(apart, scores.double(), threshold)
        else:
            kept = batched_nms(boxes, scores.double(), groups, threshold)
        covered = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
        covered[kept] = False
        return covered[: len(view)]


def _just_below(value: float) -> float:
    """Of NMS, which drops what overlaps by more than a threshold: what makes it "or more".

    In float32, to which NMS rounds its threshold on a GPU.
    """
    return torch.nextafter(torch.tensor(value), torch.tensor(0.0)).item()

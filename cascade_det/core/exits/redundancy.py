"""The rule that drops a region which a better one covers."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from cascade_det.core.exits.view import RegionView


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
        # In float64, so that a batch decides as its images do one by one: torchvision may shift
        # the boxes of each group, and float32 would lose the fraction of a pixel. It shifts by
        # the largest coordinate, which must not be NaN; what is empty covers nothing.
        boxes = boxes.double().where(boxes.isfinite(), 0.0)
        kept = batched_nms(boxes, scores.double(), groups, _just_below(self.iou))
        covered = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
        covered[kept] = False
        return covered[: len(view)]


def _just_below(value: float) -> float:
    """Of NMS, which drops what overlaps by more than a threshold: what makes it "or more".

    In float32, to which NMS rounds its threshold on a GPU.
    """
    return torch.nextafter(torch.tensor(value), torch.tensor(0.0)).item()

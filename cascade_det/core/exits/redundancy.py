"""The rule that drops a region which a better one covers."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms

from cascade_det.core.exits.view import Accepted, RegionView


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
        boxes, scores, groups = view.boxes, view.scores, self._groups(view)
        if view.accepted is not None:
            accepted = view.accepted
            boxes = torch.cat((boxes, accepted.boxes))
            scores = torch.cat((scores, accepted.scores))
            groups = torch.cat((groups, self._groups(accepted)))
        # Groups that are shifted apart never overlap; float64 keeps the fraction of a pixel
        # however many there are, so that a batch decides as its images do one by one.
        _, groups = torch.unique(groups, return_inverse=True)
        apart = boxes.double() + (groups * (boxes.max() + 1.0).double())[:, None]
        covered = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
        # nms() drops what overlaps by more; the largest number below makes that "or more".
        covered[nms(apart, scores.double(), _just_below(self.iou))] = False
        return covered[: len(view)]

    def _groups(self, regions: RegionView | Accepted) -> Tensor:
        return regions.image_index * (1 << 20) + regions.classes


def _just_below(value: float) -> float:
    return torch.nextafter(torch.tensor(value).double(), torch.tensor(0.0).double()).item()

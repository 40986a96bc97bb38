"""The rule that drops regions covered by a better one."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade_det.core.exits.view import RegionView
from cascade_det.core.structures.on_device import grouped_nms

# One NMS call is quadratic in the regions; torchvision switches to one per class from 1,000 on,
# which is slower up to about this number (80 classes, 8 images, on a CPU).
MOST_IN_ONE_CALL = 10_000


class DropCovered:
    """Drops regions that overlap a better one of their class and image, live or accepted.

    The class is the most probable foreground class. As in NMS, a dropped region covers no other.

    Args:
        iou: smallest overlap, in (0, 1].
    """

    reason = "redundant"

    def __init__(self, iou: float) -> None:
        self.iou = iou

    def is_active(self, stage: int) -> bool:
        """After every stage; before stage 0 there are no classes."""
        return stage >= 0

    def exit_mask(self, view: RegionView) -> Tensor:
        """Bool ``[R]``."""
        assert view.probs is not None
        classes = view.probs.shape[1] - 1
        views = [view, *view.accepted]
        boxes = torch.cat([v.boxes for v in views])  # [R + A, 4], A accepted regions
        scores = torch.cat([v.scores for v in views])  # [R + A]
        groups = torch.cat([v.image_index * classes + v.classes for v in views])  # [R + A]
        # Groups are shifted apart. In float64, because float32 would lose fractions of a pixel and
        # a batch would decide unlike its images alone. The shift is the largest coordinate, so
        # NaN and Inf become 0; an empty box covers nothing.
        boxes = boxes.double().where(boxes.isfinite(), 0.0)
        threshold = _just_below(self.iou)
        kept = grouped_nms(
            boxes, scores.double(), groups, threshold, most_in_one_call=MOST_IN_ONE_CALL
        )
        covered = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
        covered.index_fill_(0, kept, False)
        return covered[: len(view)]


def _just_below(value: float) -> float:
    """The float32 below ``value``: turns the "more than" of NMS into "at least".

    In float32, because NMS on a GPU rounds its threshold to it.
    """
    return torch.nextafter(torch.tensor(value), torch.tensor(0.0)).item()

"""The rule that drops regions covered by a better one."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade_det.core.exits.view import RegionView
from cascade_det.core.structures.nms import nms_mask


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
        views = [view, *view.accepted]
        boxes = torch.cat([v.boxes for v in views])  # [R + A, 4], A accepted regions
        # NaN and Inf become 0; an empty box covers nothing. In float64, because a CPU shifts the
        # boxes of each class, and float32 would lose fractions of a pixel.
        boxes = boxes.double().where(boxes.isfinite(), 0.0)
        remains = nms_mask(
            boxes,
            torch.cat([v.scores for v in views]).double(),
            torch.cat([v.image_index for v in views]),
            torch.cat([v.classes for v in views]),
            num_images=view.num_images,
            num_classes=view.probs.shape[1] - 1,
            iou=_just_below(self.iou),
        )
        return ~remains[: len(view)]


def _just_below(value: float) -> float:
    """The float32 below ``value``: turns the "more than" of NMS into "at least".

    In float32, because NMS on a GPU rounds its threshold to it.
    """
    return torch.nextafter(torch.tensor(value), torch.tensor(0.0)).item()

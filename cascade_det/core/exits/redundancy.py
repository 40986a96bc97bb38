"""The rule that drops regions covered by a better one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade_det.core.exits.view import RegionView
from cascade_det.core.structures.nms import grouped_nms, nms_mask


class DropCovered:
    """Drops regions that overlap a better one of their class and image, live or accepted.

    The class is the most probable foreground class. As in NMS, a dropped region covers no other.

    Args:
        iou: smallest overlap, in (0, 1].
    """

    reason = "redundant"

    def __init__(self, iou: float) -> None:
        self.iou = iou
        self._threshold = _just_below(iou)

    def is_active(self, stage: int) -> bool:
        """After every stage; before stage 0 there are no classes."""
        return stage >= 0

    def exit_mask(self, view: RegionView) -> Tensor:
        """Bool ``[R]``."""
        if view.gone is None or view.boxes.device.type != "cpu":
            return self._covered(view, view.accepted)
        # The classes of live regions alone: a maximum over many classes takes a CPU long.
        rows = view.live_rows()
        covered = self._covered(view.boxes_of(rows), view.accepted)
        return torch.zeros_like(view.gone).index_copy_(0, rows, covered)

    def _covered(self, view: RegionView, accepted: Sequence[RegionView]) -> Tensor:
        """Bool ``[R]``; regions that are gone cover none."""
        assert view.probs is not None
        images = view.image_index
        if view.gone is not None:
            images = images.masked_fill(view.gone, view.num_images)  # takes no part
        views = [view, *accepted]
        # NaN and Inf become 0; an empty box covers nothing. In float64, because a CPU shifts the
        # boxes of each class, and float32 would lose fractions of a pixel.
        boxes = _joined([v.boxes for v in views]).double().nan_to_num(0.0, 0.0, 0.0)  # [R + A, 4]
        scores = _joined([v.scores for v in views]).double()
        classes = _joined([v.classes for v in views])
        if boxes.device.type == "cpu" and view.num_images == 1:  # in half the time
            covered = torch.ones(len(boxes), dtype=torch.bool)
            covered[grouped_nms(boxes, scores, classes, self._threshold)] = False
            return covered[: len(view)]
        remains = nms_mask(
            boxes,
            scores,
            _joined([images, *(v.image_index for v in accepted)]),
            classes,
            num_images=view.num_images,
            num_classes=view.probs.shape[1] - 1,
            iou=self._threshold,
        )
        return ~remains[: len(view)]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Of R live regions and A accepted ones, mostly none: ``[R + A, ...]``."""
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


def _just_below(value: float) -> float:
    """The float32 below ``value``: turns the "more than" of NMS into "at least".

    In float32, because NMS on a GPU rounds its threshold to it.
    """
    return torch.nextafter(*torch.tensor([value, 0.0], device="cpu")).item()

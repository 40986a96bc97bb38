"""The input of exit rules: the live regions at a gate.

R live regions of the whole batch, K foreground classes; the last class is background. Boxes are
float32 XYXY in absolute pixels of the resized image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cascade_det.core.structures.boxes import paired_iou
from cascade_det.core.structures.on_device import group_sizes, take_rows

BEFORE_STAGES = -1


@dataclass
class RegionView:
    """Live regions after a stage, or the proposals before stage 0 (``stage`` -1).

    ``boxes_before``, ``probs`` and ``agreements`` are ``None`` before stage 0; fields that no rule
    needs are ``None`` too.

    Attributes:
        stage: the last stage that ran; -1 before stage 0.
        num_images: N.
        image_index: int64 ``[R]``, ascending.
        boxes: float32 ``[R, 4]``, refined by the stage; the proposals before stage 0.
        objectness: float32 ``[R]``, logits of the proposals.
        proposal_index: int64 ``[R]``, index of each region among the proposals of the batch.
        boxes_before: float32 ``[R, 4]``, the boxes that the stage pooled.
        probs: float32 ``[R, K + 1]`` of the score ensemble up to ``stage``.
        agreements: int64 ``[R]``, number of consecutive stages before with the same most probable
            class (background included) in ``probs``.
        predicted_ious: float32 ``[R]`` in [0, 1], of ``boxes`` with their object.
        crops: float32 ``[R, C]``, one feature vector per proposal; only before stage 0.
        accepted: views of the regions that exited as confident after earlier stages.
        sizes: N numbers of regions of each image, where the CPU knows them.
        gone: bool ``[R]``, regions that exit by an earlier rule of this gate. They are not live any
            more, and what a rule answers for them does not count. ``None`` for none.
    """

    stage: int
    num_images: int
    image_index: Tensor
    boxes: Tensor
    objectness: Tensor
    proposal_index: Tensor | None = None
    boxes_before: Tensor | None = None
    probs: Tensor | None = None
    agreements: Tensor | None = None
    predicted_ious: Tensor | None = None
    crops: Tensor | None = None
    accepted: Sequence[RegionView] = ()
    sizes: Sequence[int] | None = None
    gone: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor | slice) -> RegionView:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        chosen: dict[str, Any] = {
            n: take_rows(x, index) if isinstance(x, Tensor) else x for n, x in fields.items()
        }
        return self._with_scores(RegionView(**chosen | {"sizes": None}), index)

    def without(self, gone: Tensor) -> RegionView:
        """The same rows, of which those of ``gone``, bool ``[R]``, are not live any more.

        Nothing is copied, and the number of rows is known without waiting for a GPU.
        """
        return self._with_scores(dataclasses.replace(self, gone=gone))

    def live_rows(self) -> Tensor:
        """int64: the rows that are live, where some are not; a GPU makes the CPU wait for them."""
        assert self.gone is not None
        return torch.nonzero(~self.gone).squeeze(1)

    def boxes_of(self, index: Tensor) -> RegionView:
        """Some of the regions, with boxes, scores and classes alone; all of them are live."""
        lean = RegionView(
            self.stage,
            self.num_images,
            self.image_index,
            self.boxes,
            self.objectness,
            probs=self.probs,
        )
        return self._with_scores(lean)[index]

    @cached_property
    def scores(self) -> Tensor:
        """``[R]`` in [0, 1]: largest foreground probability; objectness before stage 0."""
        if self.probs is None:
            return torch.sigmoid(self.objectness)
        # Without their classes, which are often read of a few regions alone, several times as fast.
        return self.probs[:, :-1].amax(dim=1)

    @cached_property
    def classes(self) -> Tensor:
        """int64 ``[R]`` in ``[0, K)``: the foreground class of ``scores``; 0 before stage 0."""
        if self.probs is None:
            return torch.zeros_like(self.image_index)
        return self.probs[:, :-1].argmax(dim=1)

    @cached_property
    def is_foreground(self) -> Tensor:
        """Bool ``[R]``: no class, background included, is more probable than ``classes``."""
        assert self.probs is not None
        return self.scores >= self.probs[:, -1]

    @property
    def entropy(self) -> Tensor:
        """``[R]``: entropy of ``probs`` in nats."""
        assert self.probs is not None
        return -torch.special.xlogy(self.probs, self.probs).sum(dim=1)

    @property
    def margin(self) -> Tensor:
        """``[R]`` in [0, 1]: difference of the two largest of ``probs``."""
        assert self.probs is not None
        first, second = self.probs.topk(2, dim=1).values.unbind(dim=1)  # [R] each
        return first - second

    @cached_property
    def refinement_ious(self) -> Tensor:
        """float32 ``[R]``: IoU of each box before and after the stage."""
        assert self.boxes_before is not None
        return paired_iou(self.boxes, self.boxes_before)

    @cached_property
    def counts(self) -> Tensor:
        """int64 ``[N]``: live regions of each image."""
        if self.gone is None:
            return group_sizes(self.image_index, self.num_images)
        counts = torch.zeros(self.num_images, dtype=torch.int64, device=self.gone.device)
        return counts.scatter_add_(0, self.image_index, (~self.gone).long())

    @cached_property
    def ranks(self) -> Tensor:
        """int64 ``[R]``: rank of each live region in its image by ``scores``, 0 for the best.

        Equal scores keep their order. The regions that are gone have the ranks after the others.
        """
        # Floats that are not negative are ordered as the integers of their bits are: image and
        # score make one key, which is sorted several times as fast as the floats themselves.
        key = -(self.scores.detach().float().view(torch.int32) & 0x7FFFFFFF)
        if self.gone is not None:
            key.masked_fill_(self.gone, 1)
        places = torch.arange(len(self), device=key.device)
        if self.num_images == 1:
            order = torch.argsort(key, stable=True)
        else:
            order = torch.argsort((self.image_index << 32) + key, stable=True)
            # The image of a place is that of the row, and begins at its first row.
            places = places - torch.searchsorted(self.image_index, self.image_index)
        return torch.empty_like(order).scatter_(0, order, places)

    def _with_scores(self, view: RegionView, index: Tensor | slice | None = None) -> RegionView:
        """``view`` with what is already computed of its rows: a maximum over many classes."""
        for name in ("scores", "classes"):
            if name in vars(self):
                known = vars(self)[name]
                vars(view)[name] = known if index is None else take_rows(known, index)
        return view

"""The input of exit rules: the live regions at a gate.

R live regions of the whole batch, K foreground classes; the last class is background. Boxes are
float32 XYXY in absolute pixels of the resized image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cascade_det.core.structures.boxes import paired_iou
from cascade_det.core.structures.on_device import group_sizes

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

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor) -> RegionView:
        whole = ("stage", "num_images", "accepted")
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        subset = RegionView(
            **{n: x if n in whole or x is None else x[index] for n, x in fields.items()}
        )
        if "_best" in vars(self):  # the maximum over many classes is expensive
            vars(subset)["_best"] = tuple(x[index] for x in self._best)
        return subset

    @cached_property
    def scores(self) -> Tensor:
        """``[R]`` in [0, 1]: largest foreground probability; objectness before stage 0."""
        return torch.sigmoid(self.objectness) if self.probs is None else self._best[0]

    @cached_property
    def classes(self) -> Tensor:
        """int64 ``[R]`` in ``[0, K)``: the foreground class of ``scores``; 0 before stage 0."""
        return torch.zeros_like(self.image_index) if self.probs is None else self._best[1]

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
        return group_sizes(self.image_index, self.num_images)

    @cached_property
    def ranks(self) -> Tensor:
        """int64 ``[R]``: rank of each region in its image by ``scores``, 0 for the best.

        Equal scores keep their order.
        """
        by_score = torch.argsort(self.scores, descending=True, stable=True)
        # Image by image, best score first.
        order = by_score[torch.argsort(self.image_index[by_score], stable=True)]
        first = torch.cumsum(self.counts, 0) - self.counts  # [N]
        places = torch.arange(len(self), device=order.device) - first[self.image_index[order]]
        return torch.empty_like(order).scatter_(0, order, places)

    @cached_property
    def _best(self) -> tuple[Tensor, Tensor]:
        assert self.probs is not None
        best = self.probs[:, :-1].max(dim=1)  # [R]
        return best.values, best.indices

"""What the exit rules see of the regions that are still in the cascade.

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

BEFORE_STAGES = -1


@dataclass
class Accepted:
    """Regions that are final already.

    Attributes:
        boxes: float32 ``[A, 4]``.
        scores: float32 ``[A]``, of their best class.
        classes: int64 ``[A]`` in ``[0, K)``.
        image_index: int64 ``[A]``.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    image_index: Tensor

    @classmethod
    def of(cls, views: Sequence[RegionView]) -> Accepted | None:
        """Those of several stages together; ``None`` for nothing."""
        if not views:
            return None
        return cls(
            torch.cat([view.boxes for view in views]),
            torch.cat([view.scores for view in views]),
            torch.cat([view.classes for view in views]),
            torch.cat([view.image_index for view in views]),
        )


@dataclass
class RegionView:
    """Live regions after a stage, or (``stage`` -1) the proposals before the first one.

    Attributes:
        stage: the last stage that the regions saw; -1 before stage 0.
        num_images: N.
        image_index: int64 ``[R]``, rising.
        boxes: float32 ``[R, 4]``, as the stage refined them; the proposals before stage 0.
        objectness: float32 ``[R]``, logits of the proposals.
        rows: int64 ``[R]``, which of the proposals of the batch each region was; ``None``
            where nobody asks.
        boxes_before: float32 ``[R, 4]``, what the stage cropped; ``None`` before stage 0.
        probs: float32 ``[R, K + 1]`` of the score ensemble up to ``stage``: by default the mean of
            the stages; ``None`` before stage 0.
        agreements: int64 ``[R]``, how many stages in a row before this one had the same most
            probable class (background included) in ``probs``; ``None`` before stage 0, and where
            no rule asks.
        predicted_ious: float32 ``[R]`` in [0, 1], of ``boxes`` with their object; ``None``
            where there is no head for it.
        crops: float32 ``[R, C]``, one feature vector for each proposal, before stage 0 and only
            where a pruner wants them.
        accepted: regions that left as confident before this stage; ``None`` where no rule asks.
    """

    stage: int
    num_images: int
    image_index: Tensor
    boxes: Tensor
    objectness: Tensor
    rows: Tensor | None = None
    boxes_before: Tensor | None = None
    probs: Tensor | None = None
    agreements: Tensor | None = None
    predicted_ious: Tensor | None = None
    crops: Tensor | None = None
    accepted: Accepted | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor) -> RegionView:
        own = ("stage", "num_images", "accepted")
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        rows = {n: x if n in own or x is None else x[index] for n, x in fields.items()}
        subset = RegionView(**rows)
        if "_best" in vars(self):  # the maximum over many classes is not looked for twice
            vars(subset)["_best"] = tuple(x[index] for x in self._best)
        return subset

    @cached_property
    def scores(self) -> Tensor:
        """``[R]`` in [0, 1]: the largest foreground probability; objectness before stage 0."""
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

    @cached_property
    def refinement_ious(self) -> Tensor:
        """float32 ``[R]``: IoU of each box with the one that the stage refined it from."""
        assert self.boxes_before is not None
        return paired_iou(self.boxes, self.boxes_before)

    @cached_property
    def counts(self) -> Tensor:
        """int64 ``[N]``: live regions of each image."""
        return torch.bincount(self.image_index, minlength=self.num_images)

    @cached_property
    def ranks(self) -> Tensor:
        """int64 ``[R]``: place of each region among the live ones of its image by ``scores``.

        The best has 0; equal scores keep their order.
        """
        by_score = torch.argsort(self.scores, descending=True, stable=True)
        order = by_score[torch.argsort(self.image_index[by_score], stable=True)]
        first = torch.cumsum(self.counts, 0) - self.counts
        places = torch.arange(len(self), device=order.device) - first[self.image_index[order]]
        return torch.empty_like(order).scatter_(0, order, places)

    @cached_property
    def _best(self) -> tuple[Tensor, Tensor]:
        assert self.probs is not None
        best = self.probs[:, :-1].max(dim=1)
        return best.values, best.indices

"""Regions on their way through the cascade, flat over the batch.

R regions, K foreground classes. Boxes are float32 XYXY in absolute pixels of the resized image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cascade_det.core.structures.boxes import flatten_images, image_bounds


@dataclass
class Regions:
    """The regions that are still in the cascade.

    Attributes:
        boxes: float32 ``[R, 4]``.
        image_index: int64 ``[R]``, rising.
        limits: float32 ``[R, 4]``, see ``image_bounds``.
        objectness: float32 ``[R]``, logits of the proposals.
        rows: int64 ``[R]``, which of the proposals of the batch each region was.
        boxes_before: float32 ``[R, 4]``, what the last stage cropped; ``None`` before stage 0,
            as all that follow.
        total: ``[R, K + 1]``, running state of the score ensemble.
        top_class: int64 ``[R]`` in ``[0, K]``, the most probable one; ``None`` where no rule
            asks for agreements.
        agreements: int64 ``[R]``, how many stages before the last one had the same, in a row;
            likewise.
        predicted_ious: float32 ``[R]``; ``None`` without a head for them.
    """

    boxes: Tensor
    image_index: Tensor
    limits: Tensor
    objectness: Tensor
    rows: Tensor
    boxes_before: Tensor | None = None
    total: Tensor | None = None
    top_class: Tensor | None = None
    agreements: Tensor | None = None
    predicted_ious: Tensor | None = None

    @classmethod
    def of_proposals(
        cls,
        proposals: Sequence[Tensor],
        objectness: Sequence[Tensor] | None,
        image_sizes: Sequence[tuple[int, int]],
    ) -> Regions:
        """The proposals of N images, before stage 0.

        Args:
            proposals: per image float32 ``[R_i, 4]``, clipped to the image.
            objectness: per image float32 ``[R_i]``; ``None`` counts as 0.
            image_sizes: N ``(height, width)``.
        """
        boxes, image_index = flatten_images(proposals)
        limits = image_bounds(image_sizes, image_index)
        logits = boxes.new_zeros(boxes.shape[0]) if objectness is None else torch.cat([*objectness])
        rows = torch.arange(boxes.shape[0], device=boxes.device)
        return cls(boxes, image_index, limits, logits, rows)

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor | slice) -> Regions:
        fields = vars(self).items()
        rows: dict[str, Any] = {name: None if x is None else x[index] for name, x in fields}
        return Regions(**rows)


@dataclass
class StageResult:
    """What a stage made of the regions that entered it.

    Attributes:
        regions: refined, in the order in which they came.
        decoded: all boxes that it predicts, ``[R, 4]`` or ``[R, 4 K]``.
        pooled: the crops ``[R, C, P, P]``, of a network that is running.
        hidden: ``[R, F]``, what the box head made of them, likewise.
    """

    regions: Regions
    decoded: Tensor
    pooled: Tensor | None = None
    hidden: Tensor | None = None

    def __getitem__(self, index: Tensor) -> StageResult:
        pooled, hidden = (None if x is None else x[index] for x in (self.pooled, self.hidden))
        return StageResult(self.regions[index], self.decoded[index], pooled, hidden)

    def scored(self, probs: Tensor, stage: int) -> ReportedRegions:
        """The regions as they are reported after ``stage``, with ``probs`` ``[R, K + 1]``."""
        image_index, rows = self.regions.image_index, self.regions.rows
        return ReportedRegions(
            self.decoded, probs, image_index, torch.full_like(image_index, stage), rows
        )


@dataclass
class ReportedRegions:
    """What regions are reported as.

    Attributes:
        boxes: ``[R, 4]`` or ``[R, 4 K]``.
        probs: ``[R, K + 1]``.
        image_index: int64 ``[R]``.
        exit_stages: int64 ``[R]``, the last stage that each saw.
        rows: int64 ``[R]``, see ``Regions``.
    """

    boxes: Tensor
    probs: Tensor
    image_index: Tensor
    exit_stages: Tensor
    rows: Tensor

"""Regions on their way through the cascade, flat over the batch.

R regions, K foreground classes. Boxes are float32 XYXY in absolute pixels of the resized image.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Regions:
    """The regions that are still in the cascade.

    Attributes:
        boxes: float32 ``[R, 4]``.
        image_index: int64 ``[R]``.
        limits: float32 ``[R, 4]``, see ``image_limits``.
        total: ``[R, K + 1]``, running state of the score ensemble, ``None`` before stage 0.
    """

    boxes: Tensor
    image_index: Tensor
    limits: Tensor
    total: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor | slice) -> Regions:
        total = None if self.total is None else self.total[index]
        return Regions(self.boxes[index], self.image_index[index], self.limits[index], total)


@dataclass
class Scored:
    """What regions are reported as: boxes ``[R, 4]`` or ``[R, 4 K]``, probabilities, exits."""

    boxes: Tensor
    probs: Tensor
    image_index: Tensor
    exit_stages: Tensor

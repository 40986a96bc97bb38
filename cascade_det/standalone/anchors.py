"""Anchors on the levels of a feature pyramid, placed exactly as in Detectron2 (no rounding)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """Anchors around the origin, sizes outermost.

    Args:
        sizes: square roots of anchor areas in pixels.
        aspect_ratios: height / width.

    Returns:
        float32 ``[len(sizes) * len(aspect_ratios), 4]``, XYXY.
    """
    anchors = []
    for size in sizes:
        for ratio in aspect_ratios:
            width = math.sqrt(size**2.0 / ratio)
            height = ratio * width
            anchors.append([-width / 2.0, -height / 2.0, width / 2.0, height / 2.0])
    return torch.tensor(anchors)


class AnchorGenerator(nn.Module):
    """Anchors at every position of every level.

    Args:
        sizes: for each level the anchor sizes in pixels.
        aspect_ratios: for each level height / width.
        strides: of the levels in pixels.
        offset: of the first anchor's centre from the image corner, in strides.
    """

    def __init__(
        self,
        *,
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[Sequence[float]],
        strides: Sequence[int],
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.offset = offset
        per_level = zip(sizes, aspect_ratios, strict=True)
        for level, (level_sizes, level_ratios) in enumerate(per_level):
            cells = cell_anchors(level_sizes, level_ratios)
            self.register_buffer(f"cells{level}", cells, persistent=False)

    @property
    def num_cell_anchors(self) -> int:
        """Anchors at each position of the first level."""
        return len(self.get_buffer("cells0"))

    def forward(self, grid_sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Anchors of each level.

        Args:
            grid_sizes: ``(height, width)`` of each feature map.

        Returns:
            per level float32 ``[H_l * W_l * A, 4]``, XYXY pixels, in the order (y, x, anchor).
        """
        anchors = []
        for level, (height, width) in enumerate(grid_sizes):
            cells = self.get_buffer(f"cells{level}")
            index = torch.arange(height * width * len(cells), device=cells.device)
            anchors.append(self.at(level, index, width))
        return anchors

    def at(self, level: int, index: Tensor, width: int) -> Tensor:
        """Chosen anchors of one level.

        Args:
            level: index of the level.
            index: int64 ``[...]``, indices of anchors in the order of ``forward``.
            width: of the level in positions.

        Returns:
            float32 ``[..., 4]``, XYXY pixels.
        """
        cells, stride = self.get_buffer(f"cells{level}"), self.strides[level]
        position = index // len(cells)
        xy = torch.stack((position % width, position // width), dim=-1)
        # In float64 first, as in Detectron2's torch.arange.
        shifts = (xy.double() * stride + self.offset * stride).float()
        return torch.cat((shifts, shifts), dim=-1) + cells[index % len(cells)]

"""Square windows of a map as sequences of tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pad_to_multiple(maps: Tensor, step: int) -> Tensor:
    """Pad maps ``[N, C, H, W]`` with zeros, right and bottom, to multiples of ``step``."""
    height, width = maps.shape[-2:]
    # Exporters handle floor division better than remainders.
    bottom, right = ((side + step - 1) // step * step - side for side in (height, width))
    return F.pad(maps, (0, right, 0, bottom))


def split_windows(maps: Tensor, size: int) -> Tensor:
    """``[N, H, W, C]``, sides multiples of ``size``, to ``[N * windows, size^2, C]``.

    Windows and the tokens of each are row by row.
    """
    images, height, width, channels = maps.shape
    grid = maps.view(images, height // size, size, width // size, size, channels)
    return _swap_axes(grid).view(-1, size * size, channels)


def join_windows(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """The inverse of ``split_windows``: ``[N, height, width, C]``."""
    rows, columns, channels = height // size, width // size, windows.shape[-1]
    grid = windows.view(-1, rows, columns, size, size, channels)
    return _swap_axes(grid).view(-1, height, width, channels)


def _swap_axes(grid: Tensor) -> Tensor:
    # A copy even of a single window: exporters would take a reshape for a view or a copy for good.
    return grid.permute(0, 1, 3, 2, 4, 5).clone(memory_format=torch.contiguous_format)

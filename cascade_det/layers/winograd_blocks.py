"""Winograd's 3x3 convolution at some blocks of 4x4 cells of a map.

What each costs is its share of ``winograd_conv2d``: a block has no border.

Shapes: N images, C channels in, K out, an H x W map, B blocks.
"""

from __future__ import annotations

from functools import partial
from math import ceil
from typing import TypeGuard

import torch
from torch import Tensor, nn

from cascade_det.layers.winograd import WinogradConv2d
from cascade_det.layers.winograd_kernel import convolve_patches
from cascade_det.layers.workers import run_in_threads, workspace

BLOCK = 4  # cells per side


def takes_blocks(conv: nn.Module, x: Tensor) -> TypeGuard[WinogradConv2d]:
    """Whether ``convolve_blocks`` computes what ``conv`` does with ``x``."""
    return isinstance(conv, WinogradConv2d) and conv.norm is None and conv.applies_to(x)


def convolve_blocks(
    x: Tensor, conv: WinogradConv2d, blocks: Tensor, out: Tensor, rows: Tensor | None = None
) -> None:
    """Convolve blocks of a map, without gradients, and write them to rows of pixels.

    Args:
        x: ``[N, C, H, W]``, channels-last, H and W multiples of ``BLOCK``.
        conv: of which ``takes_blocks`` is true.
        blocks: int64 ``[B, 3]``, image, row and column of each in the grid of blocks.
        out: ``[R, K]``, gets the result.
        rows: int64 ``[16, B]``, the row of each pixel, as of ``cells_of_blocks``; ``None`` for
            ``out`` as ``[16, B, K]``.
    """
    weight, bias = conv.transformed, conv.bias
    _, channels, height, width = x.shape
    out_channels = weight.shape[2]
    pixels = x.permute(0, 2, 3, 1).flatten(0, 2)  # a view
    most, threads = max(128, 32768 // channels), torch.get_num_threads()
    pieces = ceil(len(blocks) / most / threads) * threads  # equal work for each thread
    starts = range(0, len(blocks), max(1, ceil(len(blocks) / max(1, pieces))))
    remaining = iter(starts)

    def work() -> None:
        memory = workspace(2 * 36 * starts.step * max(channels, out_channels), x.dtype)
        for start in remaining:
            some = slice(start, start + starts.step)
            cut = partial(_gather, pixels, blocks[some], height, width)
            result = convolve_patches(cut, weight, len(blocks[some]), memory)  # [16, b, K]
            if bias is not None:
                result += bias
            if rows is None:
                out.view(16, -1, out_channels)[:, some] = result
            else:
                out.index_copy_(0, rows[:, some].flatten(), result.flatten(0, 1))

    run_in_threads(work, len(starts))


def cells_of_blocks(blocks: Tensor, height: int, width: int) -> Tensor:
    """Indices of the cells of blocks ``[B, 3]`` in the pixels of N maps: int64 ``[16, B]``."""
    y, x = _cells(blocks, BLOCK, border=0)
    return (((blocks[:, 0] * height + y) * width)[:, None] + x).flatten(0, 1)


def _cells(blocks: Tensor, side: int, border: int) -> tuple[Tensor, Tensor]:
    """Rows and columns ``[side, B]`` of the cells from ``border`` before each block on."""
    cell = torch.arange(side)[:, None] - border
    _, row, column = blocks.unbind(1)
    return row * BLOCK + cell, column * BLOCK + cell


def _gather(pixels: Tensor, blocks: Tensor, height: int, width: int, patches: Tensor) -> None:
    """The inputs of blocks ``[B, 3]``, from ``pixels [N H W, C]`` to ``patches [36, B, C]``."""
    y, x = _cells(blocks, BLOCK + 2, border=1)  # [6, B]
    first = (blocks[:, 0] * height + y.clamp(0, height - 1)) * width
    cells = first[:, None] + x.clamp(0, width - 1)  # [6, 6, B]
    inputs = patches.flatten(0, 1)
    torch.index_select(pixels, 0, cells.flatten(), out=inputs)
    outside = ((y < 0) | (y >= height))[:, None] | (x < 0) | (x >= width)
    if outside.any():
        inputs.index_fill_(0, outside.flatten().nonzero().squeeze(1), 0)

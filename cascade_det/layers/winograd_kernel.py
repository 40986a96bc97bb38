"""Winograd's F(4x4, 3x3) convolution for float32 on CPUs (arXiv 1509.09308).

A direct convolution already runs at the peak of the machine, so this one multiplies less: a
quarter of the multiplications. The map is cut into tiles of 4x4 outputs, each from 6x6 inputs.
Inputs and weights are transformed, 36 matrix products over the channels replace 144 per tile, and
the result is transformed back. The transforms of all channels of many tiles are one matrix product
each. Work goes in bands of tile rows that fit the cache, each done by one thread from start to end.

Shapes: N images, C channels in, K out, an H x W map of P x Q tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade_det.layers.products import batched_product
from cascade_det.layers.workers import run_in_threads, workspace

OUTPUTS = 4  # per side of a tile

# The weight transform at the points 0, 1, -1, 2, -2 and infinity.
WEIGHT_TRANSFORM = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
# Of the inputs and the products, in 1-D (section 4.3 of the paper).
_INPUT_TRANSFORM = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_OUTPUT_TRANSFORM = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)


def transform_weight(weight: Tensor) -> Tensor:
    """``[K, C, 3, 3]`` to the ``[36, C, K]`` of ``winograd_conv2d``, computed in float64."""
    g = torch.tensor(WEIGHT_TRANSFORM, dtype=torch.float64, device=weight.device)  # [6, 3]
    transformed = torch.einsum("ai,kcij,bj->abck", g, weight.detach().double(), g)
    return transformed.flatten(0, 1).to(weight.dtype).contiguous()


def winograd_conv2d(
    x: Tensor,
    transformed_weight: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``F.conv2d(x, weight, bias, padding=1)`` up to rounding, without gradients.

    Args:
        x: ``[N, C, H, W]``, N, H and W at least 1; fastest channels-last.
        transformed_weight: ``[36, C, K]`` from ``transform_weight``.
        bias: ``[K]``.
        out: ``[N, K, H, W]``, channels-last, to write the result to.

    Returns:
        ``[N, K, H, W]``, channels-last.
    """
    x = x.permute(0, 2, 3, 1).contiguous()  # [N, H, W, C]
    images, height, width, channels = x.shape
    out_channels = transformed_weight.shape[2]
    tile_rows, tile_columns = ceil(height / 4), ceil(width / 4)
    tiled_shape = images, tile_rows, 4, tile_columns, 4, out_channels
    if out is None or height % 4 or width % 4:
        tiled = x.new_empty(tiled_shape)
    else:
        tiled = out.permute(0, 2, 3, 1).view(tiled_shape)
    out_tiles = tiled.permute(2, 4, 0, 1, 3, 5)  # [4, 4, N, P, Q, K]
    threads = torch.get_num_threads()
    most_images, most_rows = _band_size(x.shape, threads)
    starts = [
        (image, row)
        for image in range(0, images, most_images)
        for row in range(0, tile_rows, most_rows)
    ]
    remaining = iter(starts)

    def work() -> None:
        tiles = most_images * most_rows * tile_columns
        memory = workspace(2 * 36 * tiles * max(channels, out_channels), x.dtype)
        for image, row in remaining:
            some = x[image : image + most_images]
            out_band = out_tiles[:, :, image : image + most_images, row : row + most_rows]
            last = 4 * (row + out_band.shape[3]) + 1
            cut = partial(_cut_patches, _rows(some, 4 * row - 1, last))
            _convolve_patches(cut, transformed_weight, bias, out_band, memory)

    run_in_threads(work, len(starts))
    whole = tiled.view(images, 4 * tile_rows, 4 * tile_columns, out_channels)  # [N, 4 P, 4 Q, K]
    result = whole[:, :height, :width].permute(0, 3, 1, 2)  # [N, K, H, W]
    if out is None:
        return result.contiguous(memory_format=torch.channels_last)
    return out.copy_(result) if height % 4 or width % 4 else out


def _band_size(shape: Sequence[int], threads: int) -> tuple[int, int]:
    """Images and tile rows per band: enough for fast products, and few enough for the cache."""
    images, height, width, channels = shape
    tile_rows, tile_columns = ceil(height / 4), ceil(width / 4)
    tiles = max(128, 32768 // channels)
    bands = ceil(tile_rows * tile_columns / tiles)
    if images < threads:
        bands = ceil(bands / threads) * threads
    most_images = max(tiles // (tile_rows * tile_columns), 1)
    return min(most_images, ceil(images / threads)), ceil(tile_rows / bands)


def winograd_windows(
    windows: Tensor, transformed_weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``F.conv2d(windows, weight, bias)`` up to rounding: without padding, and without gradients.

    Args:
        windows: ``[N, C, H, W]``, with H - 2 and W - 2 multiples of ``OUTPUTS``; fastest
            channels-last.
        transformed_weight: ``[36, C, K]`` from ``transform_weight``.
        bias: ``[K]``.

    Returns:
        ``[N, K, H - 2, W - 2]``, channels-last.
    """
    x = windows.permute(0, 2, 3, 1).contiguous()  # [N, H, W, C]
    count, height, width, channels = x.shape
    out_channels = transformed_weight.shape[2]
    rows, columns = height // 4, width // 4  # of tiles
    tiled = x.new_empty(count, rows, 4, columns, 4, out_channels)
    out_tiles = tiled.permute(2, 4, 0, 1, 3, 5)  # [4, 4, N, P, Q, K]
    most = max(1, max(128, 32768 // channels) // (rows * columns))
    threads = torch.get_num_threads()
    pieces = ceil(ceil(count / most) / threads) * threads  # equal work for each thread
    starts = range(0, count, max(1, ceil(count / pieces)) if count else 1)
    remaining = iter(starts)

    def work() -> None:
        tiles = starts.step * rows * columns
        memory = workspace(2 * 36 * tiles * max(channels, out_channels), x.dtype)
        for start in remaining:
            some = slice(start, start + starts.step)
            cut = partial(_cut_windows, x[some])
            _convolve_patches(cut, transformed_weight, bias, out_tiles[:, :, some], memory)

    run_in_threads(work, len(starts))
    return tiled.view(count, 4 * rows, 4 * columns, out_channels).permute(0, 3, 1, 2)


def _convolve_patches(
    cut: Callable[[Tensor], None],
    transformed_weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    memory: Tensor,
) -> None:
    """Convolve the inputs of P x Q tiles of N images to ``out [4, 4, N, P, Q, K]``.

    Args:
        cut: writes the inputs to ``[6, 6, N, P, Q, C]``, rows first.
        transformed_weight: ``[36, C, K]``.
        bias: ``[K]``.
        out: gets the result.
        memory: two halves, each for the larger of 36 inputs and 36 products of all tiles.
    """
    *_, images, rows, columns, out_channels = out.shape
    channels, tiles = transformed_weight.shape[1], images * rows * columns
    first, second = memory.chunk(2)
    patches = first[: 36 * tiles * channels].view(6, 6, images, rows, columns, channels)
    points = second[: 36 * tiles * channels].view(36, tiles, channels)
    products = first[: 36 * tiles * out_channels].view(36, tiles, out_channels)
    results = second[: 16 * tiles * out_channels].view(out.shape)
    cut(patches)
    torch.mm(_both_axes(_INPUT_TRANSFORM), patches.view(36, -1), out=points.view(36, -1))
    batched_product(points, transformed_weight, out=products)
    torch.mm(_both_axes(_OUTPUT_TRANSFORM), products.view(36, -1), out=results.view(16, -1))
    if bias is None:
        out.copy_(results)
    else:
        torch.add(results, bias, out=out)


def _cut_windows(windows: Tensor, patches: Tensor) -> None:
    """``[N, 4 P + 2, 4 Q + 2, C]`` to the inputs of all tiles, ``[6, 6, N, P, Q, C]``."""
    pixels = windows.unfold(1, 6, 4).unfold(2, 6, 4)  # [N, P, Q, C, 6, 6]
    patches.copy_(pixels.permute(4, 5, 0, 1, 2, 3))


def _rows(x: Tensor, start: int, stop: int) -> Tensor:
    """Rows ``start`` to ``stop`` of ``[N, H, W, C]``, ``4 Q`` columns; padded with zeros."""
    height, width = x.shape[1:3]
    rows = x[:, max(start, 0) : min(stop, height)]
    padding = -width % 4, max(-start, 0), max(stop - height, 0)
    return F.pad(rows, (0, 0, 0, *padding)) if any(padding) else rows


def _cut_patches(rows: Tensor, patches: Tensor) -> None:
    """``[N, 4 P + 2, 4 Q, C]`` to the inputs of all tiles, ``[6, 6, N, P, Q, C]``, rows first."""
    columns = patches.shape[4]
    pixels = rows.unfold(1, 6, 4).unflatten(2, (columns, 4))  # [N, P, Q, 4, C, 6]
    pixels = pixels.permute(5, 3, 0, 1, 2, 4)  # [6, 4, N, P, Q, C]
    patches[:, 1:5] = pixels
    # The neighbours' outermost columns.
    patches[:, 0, ..., :1, :] = 0
    patches[:, 0, ..., 1:, :] = pixels[:, 3, ..., :-1, :]
    patches[:, 5, ..., :-1, :] = pixels[:, 0, ..., 1:, :]
    patches[:, 5, ..., -1:, :] = 0


@cache
def _both_axes(transform: tuple[tuple[float, ...], ...]) -> Tensor:
    """The 2-D transform of flattened tiles."""
    matrix = torch.tensor(transform, dtype=torch.float32)
    return torch.kron(matrix, matrix)

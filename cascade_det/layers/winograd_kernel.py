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
        most_tiles = most_images * most_rows * tile_columns
        memory = workspace(2 * 36 * most_tiles * max(channels, out_channels), x.dtype)
        for image, row in remaining:
            some = x[image : image + most_images]
            out_band = out_tiles[:, :, image : image + most_images, row : row + most_rows]
            last = 4 * (row + out_band.shape[3]) + 1
            cut = partial(_cut_patches, _rows(some, 4 * row - 1, last), out_band.shape[2:5])
            tiles = out_band.shape[2:5].numel()
            result = convolve_patches(cut, transformed_weight, tiles, memory).view(out_band.shape)
            if bias is None:
                out_band.copy_(result)
            else:
                torch.add(result, bias, out=out_band)

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


def convolve_patches(
    cut: Callable[[Tensor], None], transformed_weight: Tensor, tiles: int, memory: Tensor
) -> Tensor:
    """Convolve the inputs of tiles, without bias.

    Args:
        cut: writes the inputs to ``[36, tiles, C]``, rows first.
        transformed_weight: ``[36, C, K]``.
        tiles: their number.
        memory: two halves, each for the larger of 36 inputs and 36 products of all tiles.

    Returns:
        ``[16, tiles, K]``, in ``memory``.
    """
    channels, out_channels = transformed_weight.shape[1:]
    first, second = memory.chunk(2)
    patches = first[: 36 * tiles * channels].view(36, tiles, channels)
    points = second[: 36 * tiles * channels].view(36, tiles, channels)
    products = first[: 36 * tiles * out_channels].view(36, tiles, out_channels)
    results = second[: 16 * tiles * out_channels].view(16, tiles, out_channels)
    cut(patches)
    torch.mm(_both_axes(_INPUT_TRANSFORM), patches.view(36, -1), out=points.view(36, -1))
    batched_product(points, transformed_weight, out=products)
    torch.mm(_both_axes(_OUTPUT_TRANSFORM), products.view(36, -1), out=results.view(16, -1))
    return results


def _rows(x: Tensor, start: int, stop: int) -> Tensor:
    """Rows ``start`` to ``stop`` of ``[N, H, W, C]``, ``4 Q`` columns; padded with zeros."""
    height, width = x.shape[1:3]
    rows = x[:, max(start, 0) : min(stop, height)]
    padding = -width % 4, max(-start, 0), max(stop - height, 0)
    return F.pad(rows, (0, 0, 0, *padding)) if any(padding) else rows


def _cut_patches(rows: Tensor, tiles: Sequence[int], patches: Tensor) -> None:
    """``[N, 4 P + 2, 4 Q, C]`` to the inputs of N x P x Q tiles, ``[36, N P Q, C]``."""
    patches = patches.view(6, 6, *tiles, -1)
    columns = tiles[2]
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

"""Winograd's F(4x4, 3x3) convolution for float32 on CPUs (arXiv 1509.09308).

A direct convolution already runs at the peak of the machine, so this one multiplies less: a
quarter of the multiplications. The map is cut into tiles of 4x4 outputs, each from 6x6 inputs.
Inputs and weights are transformed, 36 matrix products over the channels replace 144 per tile, and
the result is transformed back. The transforms are 1-D, along rows and then columns, made of
additions of whole slices. Work goes in bands of tile rows that fit the cache, each done by one
thread from start to end.

Shapes: N images, C channels in, K out, an H x W map of P x Q tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade_det.layers.workers import carve, run_in_threads, workspace

# The weight transform at the points 0, 1, -1, 2, -2 and infinity.
WEIGHT_TRANSFORM = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
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
    _, _, out_channels = transformed_weight.shape
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
        sizes = most_images, most_rows, tile_columns, channels, out_channels
        memory = workspace(sum(map(prod, _shapes(*sizes))), x.dtype)
        for image, row in remaining:
            some = x[image : image + most_images]
            tiles = out_tiles[:, :, image : image + most_images, row : row + most_rows]
            _convolve_band(some, row, transformed_weight, bias, tiles, memory)

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


def _convolve_band(
    x: Tensor,
    row: int,
    transformed_weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    memory: Tensor,
) -> None:
    """Convolve the P tile rows of ``x [N, H, W, C]`` from ``row`` to ``out [4, 4, N, P, Q, K]``."""
    *_, images, rows, columns, out_channels = out.shape
    channels = x.shape[3]
    shapes = _shapes(images, rows, columns, channels, out_channels)
    z, v, m, o, scratch = carve(memory, shapes)
    _transform_input(_rows(x, 4 * row - 1, 4 * (row + rows) + 1), z, v, scratch)
    torch.bmm(v.view(36, -1, channels), transformed_weight, out=m.view(36, -1, out_channels))
    if bias is not None:
        m[1, 1] += bias  # the point (1, 1) goes into each of the 16 outputs once
    _transform_output(m, o, out, scratch)


def _shapes(n: int, p: int, q: int, c: int, k: int) -> list[tuple[int, ...]]:
    """The shapes of the intermediate tensors of a band: z, v, m, o and scratch."""
    scratch = 2 * max(6 * n * p * q * c, 6 * n * p * q * k, n * p * (4 * q + 2) * c)
    return [
        (6, n, p, 4 * q + 2, c),
        (6, 6, n, p, q, c),
        (6, 6, n, p, q, k),
        (6, n, p, q, 4, k),
        (scratch,),
    ]


def _rows(x: Tensor, start: int, stop: int) -> Tensor:
    """Rows ``start`` to ``stop`` of ``[N, H, W, C]``, padded with zeros."""
    height = x.shape[1]
    rows = x[:, max(start, 0) : min(stop, height)]
    if start >= 0 and stop <= height:
        return rows
    return F.pad(rows, (0, 0, 0, 0, max(-start, 0), max(stop - height, 0)))


def _transform_input(rows: Tensor, z: Tensor, v: Tensor, scratch: Tensor) -> None:
    """``[N, 4 P + 2, W, C]`` to ``v [6, 6, N, P, Q, C]``, by way of ``z [6, N, P, 4 Q + 2, C]``."""
    p, width, q = z.shape[2], rows.shape[2], v.shape[4]
    z[..., :1, :] = 0
    z[..., width + 1 :, :] = 0
    _to_points(
        [rows[:, i : i + 4 * p - 3 : 4] for i in range(6)], z[..., 1 : width + 1, :], scratch
    )
    _to_points([z[..., j : j + 4 * q - 3 : 4, :] for j in range(6)], v.transpose(0, 1), scratch)


def _transform_output(m: Tensor, o: Tensor, out: Tensor, scratch: Tensor) -> None:
    """``m [6, 6, N, P, Q, K]`` to ``out [4, 4, N, P, Q, K]``; ``o [6, N, P, Q, 4, K]`` between."""
    _from_points(m.transpose(0, 1), o.movedim(4, 0), scratch)
    _from_points(o.movedim(4, 1), out, scratch)


def _to_points(d: Sequence[Tensor], v: Tensor, scratch: Tensor) -> None:
    """Six inputs, 1-D, at the six points: ``v[i]`` is row i of the matrix B^T times ``d``."""
    s, t = _temporaries(d[0], scratch)
    torch.sub(d[4], d[2], out=s)
    torch.sub(d[0], d[2], out=t)
    torch.add(s, t, alpha=4, out=v[0])
    torch.sub(d[3], d[1], out=t)
    torch.add(s, t, alpha=2, out=v[3])
    torch.sub(s, t, alpha=2, out=v[4])
    torch.sub(d[5], d[3], out=s)
    torch.sub(s, t, alpha=4, out=v[5])
    torch.sub(d[4], d[2], alpha=4, out=s)
    torch.sub(d[3], d[1], alpha=4, out=t)
    torch.add(s, t, out=v[1])
    torch.sub(s, t, out=v[2])


def _from_points(m: Tensor, out: Tensor, scratch: Tensor) -> None:
    """Four outputs, 1-D, of the six points: ``out[i]`` is row i of the matrix A^T times ``m``."""
    s, t = _temporaries(m[0], scratch)
    torch.add(m[1], m[2], out=s)
    torch.add(m[3], m[4], out=t)
    torch.add(s, t, alpha=4, out=out[2])
    torch.add(s.add_(t), m[0], out=out[0])
    torch.sub(m[1], m[2], out=s)
    torch.sub(m[3], m[4], out=t)
    torch.add(s, t, alpha=2, out=out[1])
    torch.add(s.add_(t, alpha=8), m[5], out=out[3])


def _temporaries(like: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    size = like.numel()
    return scratch[:size].view(like.shape), scratch[size : 2 * size].view(like.shape)

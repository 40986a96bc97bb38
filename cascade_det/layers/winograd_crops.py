"""Winograd's 3x3 convolution of many small square maps at once, such as crops of regions.

The products over the channels are those of ``winograd_kernel``. Of small maps the transforms would
take longer than these products, so here each is one matrix product over a whole side of the maps:
P pixels to the points of all tiles of the side, and back. A side that is no multiple of 4 ends in
a smaller tile, which is at the first few of the same points and thus has the same weights.

Shapes: R maps, C channels in, K out, P pixels per side, T points of all tiles of a side, t tiles
that have a point.
"""

from __future__ import annotations

from functools import cache
from itertools import accumulate, groupby, pairwise
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade_det.layers.products import batched_product
from cascade_det.layers.winograd_kernel import WEIGHT_TRANSFORM
from cascade_det.layers.workers import carve

_POINTS = (0.0, 1.0, -1.0, 2.0, -2.0)  # and infinity: those of the weight transform


class _Side(NamedTuple):
    """The 1-D transforms of a side. The T are ordered by point, then by tile.

    Attributes:
        inward: ``[T, P]``, from pixels to points.
        outward: ``[P, T]``, from points to pixels.
        starts: where each of the 6 points begins in T, and T.
        runs: (first, end) of successive points with the same t.
    """

    inward: Tensor
    outward: Tensor
    starts: list[int]
    runs: list[tuple[int, int]]


def memory_shapes(size: int, regions: int, channels: int, out_channels: int) -> list[list[int]]:
    """The shapes of the scratch tensors of ``convolve_crops``."""
    points = _side(size).starts[-1]
    most = -(-size // 4)  # t of the first point
    return [
        [size, points, regions, channels],
        [size, points, regions, out_channels],
        [points * most * regions * channels],
        [points * most * regions * out_channels],
    ]


def convolve_crops(
    maps: Tensor, transformed_weight: Tensor, bias: Tensor | None, out: Tensor, memory: Tensor
) -> None:
    """``F.conv2d(maps, weight, bias, padding=1)`` up to rounding, without gradients, on one thread.

    Args:
        maps: ``[P, P, R, C]``: x, y, map, channel.
        transformed_weight: ``[36, C, K]`` from ``winograd_kernel.transform_weight``.
        bias: ``[K]``.
        out: ``[P, P, R, K]``, gets the result; may be in the memory of ``maps``.
        memory: scratch, for tensors of ``memory_shapes``.
    """
    size, _, regions, channels = maps.shape
    out_channels = transformed_weight.shape[2]
    weight = transformed_weight.view(6, 6, channels, out_channels)
    inward, outward, starts, runs = _side(size)
    columns, results, v, m = carve(memory, memory_shapes(size, regions, channels, out_channels))
    torch.bmm(inward.expand(size, -1, -1), maps.flatten(2), out=columns.flatten(2))
    for y, rows in enumerate(slice(*ends) for ends in pairwise(starts)):
        shape = starts[-1], (rows.stop - rows.start) * regions  # T, t * R
        at_points = v[: prod(shape) * channels].view(*shape, channels)
        products = m[: prod(shape) * out_channels].view(*shape, out_channels)
        torch.mm(inward, columns[:, rows].flatten(1), out=at_points.flatten(1))
        for first, end in runs:
            some = slice(starts[first], starts[end])
            batched_product(
                at_points[some].view(end - first, -1, channels),
                weight[y, first:end],
                out=products[some].view(end - first, -1, out_channels),
            )
        if bias is not None and y == 1:
            products[starts[1] : starts[2]] += bias  # goes into each pixel once
        torch.mm(outward, products.flatten(1), out=results[:, rows].flatten(1))
    torch.bmm(outward.expand(size, -1, -1), results.flatten(2), out=out.flatten(2))


@cache
def _side(size: int) -> _Side:
    """The transforms of P pixels: Toom-Cook, transposed (arXiv 1509.09308, section 4)."""
    tiles = [4] * (size // 4) + [size % 4] * (size % 4 > 0)
    inward, outward, points = [], [], []
    for start, outputs in zip(accumulate(tiles, initial=0), tiles, strict=False):
        own = [*range(outputs + 1), len(_POINTS)]
        to_points = torch.linalg.inv(_powers(own, outputs + 2)).t()
        scale = torch.tensor([WEIGHT_TRANSFORM[point][0] or 1.0 for point in own]).double()
        after = size - start - outputs
        padded = F.pad(to_points / scale[:, None], (start, after))  # [points, P + 2]
        inward.append(padded[:, 1:-1])
        outward.append(F.pad(_powers(own, outputs), (start, after)))
        points += own
    order = torch.tensor(points).argsort(stable=True)
    counts = [points.count(point) for point in range(len(_POINTS) + 1)]
    lengths = [len(list(run)) for _, run in groupby(counts)]
    return _Side(
        torch.cat(inward)[order].float(),
        torch.cat(outward)[order].t().float().contiguous(),
        list(accumulate(counts, initial=0)),
        [(end - n, end) for n, end in zip(lengths, accumulate(lengths), strict=True)],
    )


def _powers(points: list[int], count: int) -> Tensor:
    """Powers 0 to ``count - 1`` of each point; of infinity, the last, only the highest counts."""
    rows = [[_POINTS[point] ** power for power in range(count)] for point in points[:-1]]
    return torch.tensor([*rows, [0.0] * (count - 1) + [1.0]], dtype=torch.float64)

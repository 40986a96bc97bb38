"""RoIAlign as weighted bags of pixels: a kernel that is fast on CPUs.

RoIAlign (Mask R-CNN, arXiv 1703.06870, section 3) averages bilinear samples on a regular grid
inside each output bin. Grid and interpolation are separable, so a bin is a small weighted sum of
pixels: ``sum_y sum_x wy[y] * wx[x] * feature[y, x]``. This kernel evaluates the sums as weighted
bags (``F.embedding_bag``) over one table with a row per pixel of all levels of all images.
Neighbouring samples of a bin share pixels; their weights are merged first, which leaves (g + 1)
pixels per axis instead of 2 g for a grid of g adaptive samples.

Shapes: N images, L levels, C channels, R regions, P bins per side, T pixels per bin and axis
(padded), E entries of all bags.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F


def make_table(levels: list[Tensor]) -> tuple[Tensor, list[list[int]]]:
    """The pixels of all maps as rows of one table.

    Args:
        levels: L maps ``[N, C, H_l, W_l]``.

    Returns:
        ``[N * sum(H_l * W_l), C]``, without a copy if possible; and ``[N][L]``, the first row of
        each map of each image.
    """
    images, pixels = len(levels[0]), [level.shape[2] * level.shape[3] for level in levels]
    starts = [0, *accumulate(pixels[:-1])]
    table = _as_one_table(levels)
    if table is not None:  # level by level
        first_rows = [
            [images * start + image * size for start, size in zip(starts, pixels, strict=True)]
            for image in range(images)
        ]
        return table, first_rows
    first_rows = [[image * sum(pixels) + start for start in starts] for image in range(images)]
    table = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
    return table.reshape(-1, table.shape[-1]), first_rows  # [N, sum(H_l * W_l), C] flattened


def pool_bags(
    table: Tensor,
    boxes: Tensor,
    map_sizes: Tensor,
    first_row: Tensor,
    scale: Tensor,
    *,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> tuple[Tensor, Tensor]:
    """Pool at least one region.

    Args:
        table: ``[pixels, C]`` from ``make_table``.
        boxes: float32 ``[R, 4]``, XYXY in absolute pixels of the image.
        map_sizes: int64 ``[R, 2]``, (height, width) of the map of each region.
        first_row: int64 ``[R]``, first table row of that map.
        scale: float32 ``[R]``, feature pixels per image pixel.
        output_size: P.
        sampling_ratio: samples per bin and axis; 0 takes one per feature pixel.
        aligned: shift by half a pixel.

    Returns:
        ``[R, P * P * C]``, row r of region ``order[r]``; and int64 ``[R]``, ``order``.
    """
    # Both axes at once, [2 R]: first y, then x of all regions.
    length = map_sizes.t().flatten()
    offset = 0.5 if aligned else 0.0
    edges = boxes.t()[[1, 0, 3, 2]] * scale - offset  # [4, R]: y, x, y, x
    low, high = edges[:2].flatten(), edges[2:].flatten()
    extent = high - low if aligned else (high - low).clamp(min=1.0)
    pixel, weight, count = _axis(low, extent, length, output_size, sampling_ratio)
    (y, x), (y_weight, x_weight) = pixel.chunk(2), weight.chunk(2)  # [R, P, T] each
    y = first_row[:, None, None] + y * map_sizes[:, 1][:, None, None]
    index, weights, offsets, order = _outer_bags(y, y_weight, x, x_weight, count)
    bins = F.embedding_bag(
        index, table, offsets, mode="sum", per_sample_weights=weights.to(table.dtype)
    )  # [R * P * P, C]
    return bins.view(len(boxes), -1), order


def _axis(
    low: Tensor, extent: Tensor, length: Tensor, size: int, sampling_ratio: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels and weights of every bin of every region along one axis.

    Args:
        low: float32 ``[R]``, start of the regions in feature pixels.
        extent: float32 ``[R]``, their length.
        length: int64 ``[R]``, pixels of their feature map along the axis.
        size: P.
        sampling_ratio: see ``pool_bags``.

    Returns:
        int64 and float32 ``[R, P, T]``, pixels and weights; and int64 ``[R]``, the number of
        entries that are not padding.
    """
    bin_size = extent / size
    if sampling_ratio > 0:
        grid = torch.full_like(length, sampling_ratio)
    else:
        # An empty box has no samples and pools zeros, as in torchvision.
        grid = torch.ceil(bin_size).to(torch.int64).clamp(min=0)
    samples = grid.clamp(min=1)
    sample = torch.arange(int(samples.max()), device=low.device)
    bins = torch.arange(size, device=low.device)[:, None]
    bin_size = bin_size[:, None, None]
    # [R, P, samples], in the order of torchvision, so that both round alike.
    at = low[:, None, None] + bins * bin_size + (sample + 0.5) * bin_size / samples[:, None, None]
    # As in torchvision: samples more than a pixel outside count as 0, the others are clamped.
    inside = (at >= -1.0) & (at <= length[:, None, None]) & (sample < grid[:, None, None])
    share = inside / samples[:, None, None]
    last = (length - 1)[:, None, None]
    at = torch.minimum(at.where(inside, 0.0).clamp(min=0), last)
    pixel = at.to(torch.int64)
    fraction = at - pixel
    weights = torch.cat([(1 - fraction) * share, fraction * share], dim=2)
    pixels = torch.cat([pixel, torch.minimum(pixel + 1, last)], dim=2)  # [R, P, 2 * samples]
    if sampling_ratio > 0:
        return pixels, weights, 2 * grid
    # Adaptive samples are at most a pixel apart: a bin touches at most grid + 1 consecutive
    # pixels. Samples that do not count have no weight, so their index may be clamped.
    first = pixels[..., :1]
    slots = len(sample) + 1
    merged = weights.new_zeros(len(low), size, slots)
    merged.scatter_add_(2, (pixels - first).clamp(0, slots - 1), weights)
    slot = torch.arange(slots, device=low.device)
    return torch.minimum(first + slot, last), merged, grid + 1


def _as_one_table(levels: list[Tensor]) -> Tensor | None:
    """A view ``[N * sum(H_l * W_l), C]`` if the maps lie one after another, else ``None``."""
    first = levels[0]
    address = first.data_ptr()
    for level in levels:
        if (
            (torch.is_grad_enabled() and level.requires_grad)
            or not level.is_contiguous(memory_format=torch.channels_last)
            or level.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or level.data_ptr() != address
        ):
            return None
        address += level.nbytes
    channels = first.shape[1]
    rows = sum(level.numel() for level in levels) // channels
    return first.as_strided((rows, channels), (channels, 1))


def _outer_bags(
    y: Tensor, y_weight: Tensor, x: Tensor, x_weight: Tensor, count: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pixels of each 2-D bin: all rows of its y bin times all columns of its x bin.

    Regions whose bins have the same number of pixels are written together, each entry once; the
    bags are therefore sorted by that number.

    Args:
        y: int64 ``[R, P, T]``, first table row of each feature row.
        y_weight: float32 ``[R, P, T]``.
        x: int64 ``[R, P, T]``, feature columns.
        x_weight: float32 ``[R, P, T]``.
        count: int64 ``[2 R]``, entries that are not padding, of y and then of x.

    Returns:
        int64 ``[E]`` table rows, float32 ``[E]`` weights, int64 ``[R * P * P]`` starts of the
        bags, and int64 ``[R]``, the region of each P * P bags.
    """
    bins = y.shape[1] ** 2
    y_count, x_count = count.view(2, -1)
    shape = y_count * (y.shape[2] + 1) + x_count
    shape, order = torch.sort(shape)
    y, y_weight, x, x_weight = y[order], y_weight[order], x[order], x_weight[order]
    per_bin = (y_count * x_count)[order]
    length = per_bin.repeat_interleave(bins)
    shapes, regions = torch.unique_consecutive(shape, return_counts=True)
    index = y.new_empty(int(per_bin.sum()) * bins)
    weights = y_weight.new_empty(len(index))
    entry = region = 0
    for both, many in zip(shapes.tolist(), regions.tolist(), strict=True):
        rows, columns = divmod(both, y.shape[2] + 1)
        same_shape = slice(region, region + many)
        entries = slice(entry, entry + many * bins * rows * columns)
        region, entry = same_shape.stop, entries.stop
        for out, at_y, at_x, combine in (
            (index, y, x, torch.add),
            (weights, y_weight, x_weight, torch.mul),
        ):
            combine(
                at_y[same_shape, :, None, :rows, None],
                at_x[same_shape, None, :, None, :columns],
                out=out[entries].view(many, y.shape[1], y.shape[1], rows, columns),
            )
    return index, weights, length.cumsum(0) - length, order

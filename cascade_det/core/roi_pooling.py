"""RoIAlign over a feature pyramid, with a kernel that is fast on CPUs.

Shapes: N images, L levels, C channels, R regions of the whole batch, P the output size.

RoIAlign (Mask R-CNN, arXiv 1703.06870, section 3) averages bilinear samples on a regular grid
inside each output bin. Both the grid and the interpolation are separable, so a bin is a small
weighted sum of pixels: ``sum_y sum_x wy[y] * wx[x] * feature[y, x]``. The ``bags`` kernel writes
these sums as weighted bags over one table that holds the pixels of all levels of all images, one
row per pixel. Neighbouring samples of a bin share pixels; their weights are merged first, which
leaves (g + 1) pixels per axis instead of 2 g for a grid of g adaptive samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

# Section 4.2 of the FPN paper (arXiv 1612.03144): a box of this size belongs on this level.
CANONICAL_BOX_SIZE = 224
CANONICAL_LEVEL = 4


def assign_levels(boxes: Tensor, *, min_level: int, max_level: int) -> Tensor:
    """Index of the pyramid level of each box, by equation (1) of the FPN paper.

    Args:
        boxes: float32 ``[R, 4]``, XYXY in absolute pixels.
        min_level: log2 of the finest stride.
        max_level: log2 of the coarsest stride.

    Returns:
        int64 ``[R]`` in ``[0, max_level - min_level]``; empty boxes go to the finest level.
    """
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    sizes = torch.sqrt(areas)
    levels = torch.floor(CANONICAL_LEVEL + torch.log2(sizes / CANONICAL_BOX_SIZE + 1e-8))
    return torch.clamp(levels, min=min_level, max=max_level).to(torch.int64) - min_level


@dataclass
class Pyramid:
    """A feature pyramid made ready for pooling; make it once per batch, pool it at every stage.

    Attributes:
        features: L maps ``[N, C, H_l, W_l]``, finest first.
        table: ``[N * sum(H_l * W_l), C]``, the pixels of all maps, or ``None`` for the torchvision
            kernel.
        first_rows: of the table, ``[N][L]``: where the pixels of each map of each image begin.
    """

    features: list[Tensor]
    table: Tensor | None = None
    first_rows: list[list[int]] = field(default_factory=list)


class RoIPooler(nn.Module):
    """Pools each region from the level that its size belongs to.

    Args:
        output_size: P, bins per side.
        strides: stride of each level in pixels, powers of two, each twice the one before.
        sampling_ratio: samples per bin and axis; 0 takes one per feature pixel (adaptive).
        aligned: shift by half a pixel as Detectron2's ``ROIAlignV2``; ``False`` is ``ROIAlign``.
        kernel: ``bags``, ``torchvision``, or ``auto`` (bags on the CPU, torchvision elsewhere).
            Under ``torch.jit.trace`` it is always torchvision's, the one that can be recorded.

    Raises:
        ValueError: if the strides do not form a pyramid or the kernel is unknown.
    """

    def __init__(
        self,
        *,
        output_size: int,
        strides: tuple[int, ...],
        sampling_ratio: int = 0,
        aligned: bool = True,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        levels = [math.log2(stride) for stride in strides]
        if any(level != levels[0] + i for i, level in enumerate(levels)) or levels[0] % 1:
            raise ValueError(f"strides must be powers of two, each twice the last: {strides}")
        if kernel not in ("auto", "bags", "torchvision"):
            raise ValueError(f"kernel must be auto, bags or torchvision, not {kernel!r}")
        self.output_size = output_size
        self.strides = tuple(strides)
        self.min_level, self.max_level = int(levels[0]), int(levels[-1])
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.kernel = kernel

    def prepare(self, features: list[Tensor], *, dtype: torch.dtype | None = None) -> Pyramid:
        """Lay out the levels for the chosen kernel.

        Args:
            features: L maps ``[N, C, H_l, W_l]``, finest first, as many as strides.
            dtype: that the ``bags`` kernel pools in and returns; ``None``: that of the features.

        Raises:
            ValueError: if the number of maps differs from the number of strides.
        """
        if len(features) != len(self.strides):
            raise ValueError(f"{len(features)} feature maps for {len(self.strides)} strides")
        has_fast_bags = features[0].device.type == "cpu"
        wants_bags = self.kernel == "bags" or (self.kernel == "auto" and has_fast_bags)
        if not wants_bags or torch.jit.is_tracing():
            return Pyramid(features)
        levels = [level.to(dtype or level.dtype) for level in features]
        images, pixels = len(levels[0]), [level.shape[2] * level.shape[3] for level in levels]
        starts = [0, *accumulate(pixels[:-1])]
        table = _as_one_table(levels)
        if table is not None:  # level by level
            first_rows = [
                [images * start + image * size for start, size in zip(starts, pixels, strict=True)]
                for image in range(images)
            ]
            return Pyramid(features, table, first_rows)
        first_rows = [[image * sum(pixels) + start for start in starts] for image in range(images)]
        table = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
        return Pyramid(features, table.reshape(-1, table.shape[-1]), first_rows)

    def forward(self, pyramid: Pyramid, boxes: Tensor, image_index: Tensor) -> Tensor:
        """Pool regions.

        Args:
            pyramid: what ``prepare`` returned.
            boxes: float32 ``[R, 4]``, XYXY in absolute pixels of the padded batch.
            image_index: int64 ``[R]``, the image of each box.

        Returns:
            ``[R, C, P, P]`` in the type of the features; differentiable in the features.
        """
        if pyramid.table is None:
            return self._pool_with_torchvision(pyramid.features, boxes, image_index)
        size = self.output_size
        rows, order = self.rows(pyramid, boxes, image_index)
        return rows[torch.argsort(order)].unflatten(1, (size, size, -1)).permute(0, 3, 1, 2)

    def _levels(self, boxes: Tensor) -> Tensor:
        return assign_levels(boxes, min_level=self.min_level, max_level=self.max_level)

    def _pool_with_torchvision(
        self, features: list[Tensor], boxes: Tensor, image_index: Tensor
    ) -> Tensor:
        levels, none = self._levels(boxes), len(features)
        # A box with NaN belongs to no level, and pools zeros.
        levels = levels.where((levels >= 0) & (levels < none), none)
        rows = _rows_of_each(levels, none + 1)
        regions = torch.cat([image_index[:, None].to(boxes.dtype), boxes], dim=1)
        size = self.output_size
        crops = []
        for feature, stride, of_level in zip(features, self.strides, rows[:-1], strict=True):
            # Coordinates stay float32: in half precision a box of 500 px is off by pixels.
            pooled = roi_align(
                feature.float(),
                regions[of_level],
                size,
                1.0 / stride,
                self.sampling_ratio,
                self.aligned,
            )
            crops.append(pooled.to(feature.dtype))
        crops.append(features[0].new_zeros(rows[-1].shape[0], features[0].shape[1], size, size))
        return torch.cat(crops)[torch.argsort(torch.cat(rows))]

    def rows(self, pyramid: Pyramid, boxes: Tensor, image_index: Tensor) -> tuple[Tensor, Tensor]:
        """Pool regions without putting the result into the order and layout of ``forward``.

        Args:
            pyramid: of the ``bags`` kernel.
            boxes: as in ``forward``.
            image_index: likewise.

        Returns:
            ``[R, P * P * C]``, row r of region ``order[r]``; and int64 ``[R]``, ``order``.
        """
        assert pyramid.table is not None
        size, channels = self.output_size, pyramid.table.shape[1]
        if len(boxes) == 0:
            # A slice keeps the graph: a stage without regions still gives (zero) gradients.
            return pyramid.table[:0].reshape(0, size * size * channels), image_index
        boxes, device = boxes.detach(), boxes.device
        # A box with NaN has no level; any will do, since none of its samples counts.
        levels = self._levels(boxes).clamp(0, len(self.strides) - 1)
        shapes = torch.tensor([f.shape[-2:] for f in pyramid.features], device=device)
        first_row = torch.tensor(pyramid.first_rows, device=device)[image_index, levels]
        # Both axes as one: the vertical one of all regions, then the horizontal one.
        length = shapes[levels].t().flatten()
        scale = torch.tensor([1.0 / s for s in self.strides], device=device)[levels]
        offset = 0.5 if self.aligned else 0.0
        edges = boxes.t()[[1, 0, 3, 2]] * scale - offset
        low, high = edges[:2].flatten(), edges[2:].flatten()
        extent = high - low if self.aligned else (high - low).clamp(min=1.0)

        pixel, weight, count = self._axis(low, extent, length)
        (y, x), (y_weight, x_weight) = pixel.chunk(2), weight.chunk(2)
        y = first_row[:, None, None] + y * shapes[levels, 1][:, None, None]
        index, weights, offsets, order = _outer_bags(y, y_weight, x, x_weight, count)
        bins = F.embedding_bag(
            index,
            pyramid.table,
            offsets,
            mode="sum",
            per_sample_weights=weights.to(pyramid.table.dtype),
        )
        return bins.view(len(boxes), -1), order

    def _axis(self, low: Tensor, extent: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels and weights of every bin of every region along one axis.

        Args:
            low: float32 ``[R]``, where regions begin, in feature pixels.
            extent: float32 ``[R]``, how long they are.
            length: int64 ``[R]``, pixels of their feature map along the axis.

        Returns:
            int64 and float32 ``[R, P, T]``, pixels and weights; and int64 ``[R]``, how many of
            the T entries count (the rest is padding).
        """
        size = self.output_size
        bin_size = extent / size
        if self.sampling_ratio > 0:
            grid = torch.full_like(length, self.sampling_ratio)
        else:
            # An empty box has no samples and pools zeros, as in torchvision.
            grid = torch.ceil(bin_size).to(torch.int64).clamp(min=0)
        samples = grid.clamp(min=1)
        sample = torch.arange(int(samples.max()), device=low.device)
        bins = torch.arange(size, device=low.device)[:, None]
        bin_size = bin_size[:, None, None]
        # In torchvision's order, so that both round alike and agree on who is inside.
        at = (
            low[:, None, None]
            + bins * bin_size
            + (sample + 0.5) * bin_size / samples[:, None, None]
        )
        # torchvision's borders: more than a pixel outside counts nothing, the rest is clamped.
        inside = (at >= -1.0) & (at <= length[:, None, None]) & (sample < grid[:, None, None])
        share = inside / samples[:, None, None]
        last = (length - 1)[:, None, None]
        at = torch.minimum(at.where(inside, 0.0).clamp(min=0), last)
        pixel = at.to(torch.int64)
        fraction = at - pixel
        weights = torch.cat([(1 - fraction) * share, fraction * share], dim=2)
        pixels = torch.cat([pixel, torch.minimum(pixel + 1, last)], dim=2)
        if self.sampling_ratio > 0:
            return pixels, weights, 2 * grid
        # Adaptive samples are at most a pixel apart: a bin touches at most grid + 1 consecutive
        # pixels. Samples that do not count weigh nothing, so clamping their place is safe.
        first = pixels[..., :1]
        slots = len(sample) + 1
        merged = weights.new_zeros(len(low), size, slots)
        merged.scatter_add_(2, (pixels - first).clamp(0, slots - 1), weights)
        slot = torch.arange(slots, device=low.device)
        return torch.minimum(first + slot, last), merged, grid + 1


def _as_one_table(levels: list[Tensor]) -> Tensor | None:
    """``[N * sum(H_l * W_l), C]`` without a copy, if the maps lie so, one after another."""
    first = levels[0]
    place = first.data_ptr()
    for level in levels:
        if (
            (torch.is_grad_enabled() and level.requires_grad)
            or not level.is_contiguous(memory_format=torch.channels_last)
            or level.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or level.data_ptr() != place
        ):
            return None
        place += level.nbytes
    channels = first.shape[1]
    rows = sum(level.numel() for level in levels) // channels
    return first.as_strided((rows, channels), (channels, 1))


def _rows_of_each(groups: Tensor, count: int) -> list[Tensor]:
    """The int64 indices of each of ``count`` groups, from the int64 ``[R]`` group of each row."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        # How many there are has to stay open.
        return [torch.nonzero(groups == group).squeeze(1) for group in range(count)]
    sizes = torch.bincount(groups, minlength=count).tolist()
    return list(torch.argsort(groups, stable=True).split(sizes))


def _outer_bags(
    y: Tensor, y_weight: Tensor, x: Tensor, x_weight: Tensor, count: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pixels of each 2-D bin: every row of its y bin with every column of its x bin.

    Regions whose bins have equally many pixels are made at once, so that each entry is written
    only once; the bags are therefore in another order than the regions.

    Args:
        y: int64 ``[R, P, T]``, first table row of each feature row.
        y_weight: float32 ``[R, P, T]``.
        x: int64 ``[R, P, T]``, feature columns.
        x_weight: float32 ``[R, P, T]``.
        count: int64 ``[2 R]``, how many of the T entries count, of y and then of x.

    Returns:
        Table rows int64 ``[E]``, weights float32 ``[E]``, the start of each of the
        ``R * P * P`` bags, int64, and int64 ``[R]``: the region of each ``P * P`` of them.
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
        of_shape = slice(region, region + many)
        entries = slice(entry, entry + many * bins * rows * columns)
        region, entry = of_shape.stop, entries.stop
        for out, at_y, at_x, combine in (
            (index, y, x, torch.add),
            (weights, y_weight, x_weight, torch.mul),
        ):
            combine(
                at_y[of_shape, :, None, :rows, None],
                at_x[of_shape, None, :, None, :columns],
                out=out[entries].view(many, y.shape[1], y.shape[1], rows, columns),
            )
    return index, weights, length.cumsum(0) - length, order

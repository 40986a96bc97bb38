"""RoIAlign from all levels of a pyramid in one Triton kernel, for inference.

Imports Triton: to be imported where a kernel is launched, see ``gpu_kernels.has_triton``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Channels that a warp reads at a time: 8 half-precision numbers by each thread.
_CHANNELS_OF_A_WARP = 256


@triton.jit
def _neighbours(at: tl.tensor, length: tl.tensor) -> tl.tuple:
    """Pixels below and above a position along an axis, the share of the upper, and if it counts."""
    counts = (at >= -1.0) & (at <= length)
    at = tl.where(counts, tl.maximum(at, 0.0), 0.0)
    low = tl.minimum(at.to(tl.int64), length - 1)
    high = tl.minimum(low + 1, length - 1)
    share = tl.where(high > low, at - low, 0.0)
    return low, high, share, counts


@triton.jit
def _samples(extent: tl.tensor, BINS: tl.constexpr, RATIO: tl.constexpr) -> tl.tuple:
    """Size of a bin in feature pixels, and its number of samples along the axis."""
    size = tl.div_rn(extent, BINS * 1.0)
    if RATIO > 0:
        count = tl.full((), RATIO, tl.int32)
    else:
        count = tl.maximum(tl.ceil(size), 0.0).to(tl.int32)
    return size, count


@triton.jit
def roi_align_kernel(
    table: tl.tensor,
    boxes: tl.tensor,
    images: tl.tensor,
    first_rows: tl.tensor,
    sizes: tl.tensor,
    out: tl.tensor,
    channels: tl.tensor,
    LEVELS: tl.constexpr,
    MIN_LEVEL: tl.constexpr,
    CANONICAL_LEVEL: tl.constexpr,
    CANONICAL_SIZE: tl.constexpr,
    BINS: tl.constexpr,
    RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """All channels of one bin of one region."""
    region, cell = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x0, y0 = tl.load(boxes + region * 4), tl.load(boxes + region * 4 + 1)
    x1, y1 = tl.load(boxes + region * 4 + 2), tl.load(boxes + region * 4 + 3)

    # The level: comparisons with powers of two are what floor(log2()) decides.
    area = (x1 - x0) * (y1 - y0)
    relative = tl.div_rn(tl.sqrt_rn(area), CANONICAL_SIZE * 1.0) + 1e-8
    level = tl.full((), 0, tl.int32)
    scale = tl.full((), 0.5**MIN_LEVEL, tl.float32)
    for coarser in tl.static_range(1, LEVELS):
        is_larger = relative >= 2.0 ** (MIN_LEVEL + coarser - CANONICAL_LEVEL)
        level += is_larger.to(tl.int32)
        scale = tl.where(is_larger, 0.5 ** (MIN_LEVEL + coarser), scale)
    height, width = tl.load(sizes + level * 2), tl.load(sizes + level * 2 + 1)
    first = tl.load(first_rows + tl.load(images + region) * LEVELS + level)

    offset = 0.5 if ALIGNED else 0.0
    left, top = x0 * scale - offset, y0 * scale - offset
    across, down = x1 * scale - offset - left, y1 * scale - offset - top
    if not ALIGNED:
        across, down = tl.maximum(across, 1.0), tl.maximum(down, 1.0)
    bin_width, columns = _samples(across, BINS, RATIO)
    bin_height, lines = _samples(down, BINS, RATIO)
    # NaN has no level and Inf no end: such boxes pool zeros.
    lines = tl.where((area >= 0.0) & (area < float("inf")), lines, 0)

    channel = tl.arange(0, BLOCK)
    mask = channel < channels
    total = tl.zeros((BLOCK,), tl.float32)
    bin_top, bin_left = top + (cell // BINS) * bin_height, left + (cell % BINS) * bin_width
    for line in range(0, lines):
        y = bin_top + tl.div_rn((line + 0.5) * bin_height, lines.to(tl.float32))
        y_low, y_high, y_share, y_counts = _neighbours(y, height)
        upper, lower = (
            table + (first + y_low * width) * channels,
            table + (first + y_high * width) * channels,
        )
        for column in range(0, columns):
            x = bin_left + tl.div_rn((column + 0.5) * bin_width, columns.to(tl.float32))
            x_low, x_high, x_share, x_counts = _neighbours(x, width)
            at_low, at_high = x_low * channels + channel, x_high * channels + channel
            a = tl.load(upper + at_low, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(upper + at_high, mask=mask, other=0.0).to(tl.float32)
            c = tl.load(lower + at_low, mask=mask, other=0.0).to(tl.float32)
            d = tl.load(lower + at_high, mask=mask, other=0.0).to(tl.float32)
            above = (1.0 - x_share) * a + x_share * b
            below = (1.0 - x_share) * c + x_share * d
            sample = (1.0 - y_share) * above + y_share * below
            total += tl.where(y_counts & x_counts, sample, 0.0)
    total = tl.div_rn(total, tl.maximum(lines * columns, 1).to(tl.float32))
    place = out + (region * BINS * BINS + cell) * channels + channel
    tl.store(place, total.to(out.dtype.element_ty), mask=mask)


def roi_align_levels(
    table: Tensor,
    boxes: Tensor,
    images: Tensor,
    first_rows: Tensor,
    sizes: Tensor,
    *,
    min_level: int,
    canonical_level: int,
    canonical_size: int,
    bins: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Pool each box from the level of its size, without a wait for the device.

    Sums are float32. A box with NaN or Inf pools zeros.

    Args:
        table: ``[pixels, C]``, the pixels of all maps, channels side by side.
        boxes: float32 ``[R, 4]``, XYXY in absolute pixels of the image.
        images: int64 ``[R]``, the image of each box.
        first_rows: int64 ``[N, L]``, first table row of each map of each image.
        sizes: int64 ``[L, 2]``, (height, width) of the maps of each level.
        min_level: log2 of the finest stride; each level has twice the stride of the one before.
        canonical_level: log2 of the stride for boxes of the canonical size, as in the FPN paper.
        canonical_size: side of such a box in pixels.
        bins: P, per side.
        sampling_ratio: samples per bin and axis; 0 takes one per feature pixel.
        aligned: shift by half a pixel.

    Returns:
        ``[R, P * P, C]`` in the type of the table.
    """
    channels = table.shape[1]
    out = table.new_empty(len(boxes), bins * bins, channels)
    if out.numel() == 0:
        return out
    block = triton.next_power_of_2(channels)
    with torch.cuda.device_of(table):
        # Without fused multiply-add, so that samples lie where they lie on a CPU.
        roi_align_kernel[(len(boxes), bins * bins)](
            table,
            boxes.contiguous(),
            images.contiguous(),
            first_rows,
            sizes,
            out,
            channels,
            LEVELS=len(sizes),
            MIN_LEVEL=min_level,
            CANONICAL_LEVEL=canonical_level,
            CANONICAL_SIZE=canonical_size,
            BINS=bins,
            RATIO=sampling_ratio,
            ALIGNED=aligned,
            BLOCK=block,
            num_warps=min(max(block // _CHANNELS_OF_A_WARP, 1), 8),
            enable_fp_fusion=False,
        )
    return out

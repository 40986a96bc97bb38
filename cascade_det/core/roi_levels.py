"""RoIAlign from all levels of a pyramid as one operation, for inference.

On GPUs one Triton kernel chooses the level of each region, reads channels-last maps of any float
type and writes crops as the fast heads read them, all without a wait. The operation is defined on
CPUs too, by the bags.

Shapes: N images, L levels, C channels, R regions, P bins per side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cascade_det.core.roi_bags import pool_bags
from cascade_det.layers import gpu_kernels

# Section 4.2 of the FPN paper (arXiv 1612.03144): a box of this size belongs on this level.
CANONICAL_BOX_SIZE = 224
CANONICAL_LEVEL = 4

_OPERATION = "cascade_det::roi_align_levels"


def assign_levels(boxes: Tensor, *, min_level: int, max_level: int) -> Tensor:
    """Index of the pyramid level of each box, by equation (1) of the FPN paper.

    Args:
        boxes: float32 ``[R, 4]``, XYXY in absolute pixels.
        min_level: log2 of the finest stride.
        max_level: log2 of the coarsest stride.

    Returns:
        int64 ``[R]`` in ``[0, max_level - min_level]``; empty boxes go to the finest level.
    """
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])  # [R]
    sizes = torch.sqrt(areas)
    levels = torch.floor(CANONICAL_LEVEL + torch.log2(sizes / CANONICAL_BOX_SIZE + 1e-8))
    return torch.clamp(levels, min=min_level, max=max_level).to(torch.int64) - min_level


def pool_levels(
    table: Tensor,
    boxes: Tensor,
    images: Tensor,
    first_rows: Tensor,
    sizes: Tensor,
    *,
    min_level: int,
    bins: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Pool each region from the level of its size, without gradients.

    Args:
        table: ``[pixels, C]``, see ``cascade_det.core.roi_bags.make_table``.
        boxes: float32 ``[R, 4]``, XYXY in absolute pixels; NaN pools zeros.
        images: int64 ``[R]``, the image of each box.
        first_rows: int64 ``[N, L]``, first table row of each map of each image.
        sizes: int64 ``[L, 2]``, (height, width) of the maps of each level.
        min_level: log2 of the finest stride; each level has twice the stride of the one before.
        bins: P.
        sampling_ratio: samples per bin and axis; 0 takes one per feature pixel.
        aligned: shift by half a pixel.

    Returns:
        ``[R, P * P, C]`` in the type of the table.
    """
    pooled: Tensor = torch.ops.cascade_det.roi_align_levels(
        table.detach(),
        boxes.detach(),
        images,
        first_rows,
        sizes,
        min_level,
        bins,
        sampling_ratio,
        aligned,
    )
    return pooled


def pool_bags_of_levels(
    table: Tensor,
    boxes: Tensor,
    images: Tensor,
    first_rows: Tensor,
    sizes: Tensor,
    *,
    min_level: int,
    bins: int,
    sampling_ratio: int,
    aligned: bool,
) -> tuple[Tensor, Tensor]:
    """Pool each region from the level of its size by bags, with gradients in the table.

    Arguments as in ``pool_levels``.

    Returns:
        ``[R, P * P * C]``, row r of region ``order[r]``; and int64 ``[R]``, ``order``.
    """
    if len(boxes) == 0:
        # A slice keeps the graph: a stage without regions still gives (zero) gradients.
        return table[:0].reshape(0, bins * bins * table.shape[1]), images
    boxes, levels = boxes.detach(), len(sizes)
    # A box with NaN has no level; any will do, since none of its samples counts.
    level = assign_levels(boxes, min_level=min_level, max_level=min_level + levels - 1)
    level = level.clamp(0, levels - 1)
    return pool_bags(
        table,
        boxes,
        sizes[level],
        first_rows[images, level],
        0.5 ** (min_level + level),
        output_size=bins,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
    )


def _shape(
    table: Tensor,
    boxes: Tensor,
    images: Tensor,
    first_rows: Tensor,
    sizes: Tensor,
    min_level: int,
    bins: int,
    *_: Any,
) -> Tensor:
    return table.new_empty(boxes.shape[0], bins * bins, table.shape[1])


def _by_bags(*arguments: Any) -> Tensor:
    settings = _settings(arguments)
    rows, order = pool_bags_of_levels(*arguments[:5], **settings)
    rows = rows.unflatten(1, (settings["bins"] ** 2, -1))
    return torch.empty_like(rows).index_copy_(0, order, rows)


def _on_gpu(*arguments: Any) -> Tensor:
    if not gpu_kernels.has_triton(arguments[0].device):
        return _by_bags(*arguments)
    from cascade_det.layers.triton_roi_align import roi_align_levels

    return roi_align_levels(
        *arguments[:5],
        canonical_level=CANONICAL_LEVEL,
        canonical_size=CANONICAL_BOX_SIZE,
        **_settings(arguments),
    )


def _settings(arguments: Sequence[Any]) -> dict[str, Any]:
    """What follows the five tensors, by name."""
    names = ("min_level", "bins", "sampling_ratio", "aligned")
    return dict(zip(names, arguments[5:], strict=True))


torch.library.define(
    _OPERATION,
    "(Tensor table, Tensor boxes, Tensor images, Tensor first_rows, Tensor sizes, int min_level,"
    " int bins, int sampling_ratio, bool aligned) -> Tensor",
)
torch.library.impl(_OPERATION, "default", _by_bags)
torch.library.impl(_OPERATION, "cuda", _on_gpu)
torch.library.register_fake(_OPERATION, _shape)

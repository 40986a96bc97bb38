"""RoIAlign over a feature pyramid.

Shapes: N images, L levels, C channels, R regions of the whole batch, P bins per side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from cascade_det.core.roi_bags import make_table
from cascade_det.core.roi_levels import assign_levels, pool_bags_of_levels, pool_levels
from cascade_det.core.structures.on_device import (
    device_constant,
    indices_by_group,
    is_recorded,
)
from cascade_det.layers import gpu_kernels
from cascade_det.layers.tile_gate import tiles_of_boxes
from cascade_det.layers.tiles import FeatureMap, TiledMap, as_tensor


@dataclass
class Pyramid:
    """A feature pyramid prepared for pooling, once per batch.

    Attributes:
        features: L maps ``[N, C, H_l, W_l]``, finest first; the first may be a ``TiledMap``.
        table: ``[N * sum(H_l * W_l), C]``, the pixels of all maps, or ``None`` for the torchvision
            kernel.
        first_rows: ``[N][L]``, first table row of each map of each image.
        dtype: of crops by the torchvision kernel; ``None`` for that of the features.
    """

    features: list[FeatureMap]
    table: Tensor | None = None
    first_rows: list[list[int]] = field(default_factory=list)
    dtype: torch.dtype | None = None


class RoIPooler(nn.Module):
    """Pools each region from the pyramid level of its size.

    Args:
        output_size: P, bins per side.
        strides: stride of each level in pixels, powers of two, each twice the one before.
        sampling_ratio: samples per bin and axis; 0 takes one per feature pixel (adaptive).
        aligned: shift by half a pixel as Detectron2's ``ROIAlignV2``; ``False`` is ``ROIAlign``.
        kernel: ``bags``, ``torchvision``, or ``auto``: bags on the CPU; on GPUs torchvision's, but
            for fast heads, without gradients, one in Triton for all levels if it runs there.
            Under ``torch.jit.trace`` always torchvision's, because the others cannot be traced.

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

    def prepare(
        self, features: Sequence[FeatureMap], *, dtype: torch.dtype | None = None
    ) -> Pyramid:
        """Lay out the feature maps for the chosen kernel.

        Args:
            features: L maps ``[N, C, H_l, W_l]``, finest first, as many as strides. Of a
                ``TiledMap``, the tiles that regions read are computed when these are pooled.
            dtype: that fast heads read crops in, of the maps of all kernels but torchvision's;
                ``None`` for that of the features, and for other heads.

        Raises:
            ValueError: if the number of maps differs from the number of strides.
        """
        if len(features) != len(self.strides):
            raise ValueError(f"{len(features)} feature maps for {len(self.strides)} strides")
        if torch.jit.is_tracing():
            return Pyramid(list(features))
        if not self._reads_table(features, for_fast_heads=dtype is not None):
            # The kernel reads contiguous float32 maps: made here, once for all stages.
            planes = [as_tensor(level).float().contiguous() for level in features]
            return Pyramid([*planes], dtype=features[0].dtype)
        finest = features[0]
        if not isinstance(finest, TiledMap):
            levels = [as_tensor(level).to(dtype or level.dtype) for level in features]
            return Pyramid(list(features), *make_table(levels))
        maps = [finest.data, *(as_tensor(level) for level in features[1:])]
        table, first_rows = make_table([level.to(dtype or level.dtype) for level in maps])
        if table.untyped_storage().data_ptr() != finest.data.untyped_storage().data_ptr():
            of_images = torch.tensor([rows[0] for rows in first_rows], device=table.device)
            finest.also_write_to(table, of_images)
        return Pyramid(list(features), table, first_rows)

    def _reads_table(self, features: Sequence[FeatureMap], *, for_fast_heads: bool) -> bool:
        if self.kernel != "auto" or features[0].device.type == "cpu":
            return self.kernel != "torchvision"
        wants_kernel = for_fast_heads and not _need_graph(features)
        return wants_kernel and gpu_kernels.has_triton(features[0].device)

    def forward(self, pyramid: Pyramid, boxes: Tensor, image_index: Tensor) -> Tensor:
        """Pool regions.

        Args:
            pyramid: from ``prepare``.
            boxes: float32 ``[R, 4]``, XYXY in absolute pixels of the padded batch.
            image_index: int64 ``[R]``, the image of each box.

        Returns:
            ``[R, C, P, P]`` in the type of the features; differentiable in the features.
        """
        if pyramid.table is None:
            features = self._compute_tiles(pyramid, boxes, image_index)
            return self._pool_with_torchvision(features, pyramid.dtype, boxes, image_index)
        size = self.output_size
        rows, order = self.pool_rows(pyramid, boxes, image_index)  # [R, P * P * C], [R]
        return in_region_order(rows, order).unflatten(1, (size, size, -1)).permute(0, 3, 1, 2)

    def _levels(self, boxes: Tensor) -> Tensor:
        return assign_levels(boxes, min_level=self.min_level, max_level=self.max_level)

    def tiles_read(self, boxes: Tensor, image_index: Tensor, shape: Sequence[int]) -> Tensor:
        """The tiles of the finest map that pooling reads: bool ``[N, P, Q]``.

        Args:
            boxes: as in ``forward``.
            image_index: as in ``forward``.
            shape: ``(N, P, Q)``.
        """
        own = self._levels(boxes) <= 0  # those with NaN too
        return tiles_of_boxes(
            boxes[own],
            image_index[own],
            shape,
            scale=1.0 / self.strides[0],
            aligned=self.aligned,
        )

    def _compute_tiles(self, pyramid: Pyramid, boxes: Tensor, image_index: Tensor) -> list[Tensor]:
        """Compute the tiles that regions read; the maps, of which the first may lack others."""
        finest = pyramid.features[0]
        if isinstance(finest, TiledMap):
            finest.compute(self.tiles_read(boxes, image_index, finest.computed.shape))
        return [x.data if isinstance(x, TiledMap) else x for x in pyramid.features]

    def _pool_with_torchvision(
        self,
        features: list[Tensor],
        dtype: torch.dtype | None,
        boxes: Tensor,
        image_index: Tensor,
    ) -> Tensor:
        size = self.output_size
        dtype = dtype or features[0].dtype
        levels, none = self._levels(boxes), len(features)
        # A box with NaN has no level and pools zeros.
        levels = levels.where((levels >= 0) & (levels < none), none)
        rows = indices_by_group(levels, none + 1)
        regions = torch.cat([image_index[:, None].to(boxes.dtype), boxes], dim=1)  # [R, 5]

        def pool(level: int, plane: Tensor, own: Tensor) -> Tensor:
            pooled = roi_align(
                plane,
                regions[own],
                size,
                1.0 / self.strides[level],
                self.sampling_ratio,
                self.aligned,
            )
            return pooled.to(dtype)  # [own, C, P, P]

        def zeros(count: int) -> Tensor:
            return features[0].new_zeros(count, features[0].shape[1], size, size, dtype=dtype)

        if is_recorded():
            planes = [level.float() for level in features]
            crops = [*map(pool, range(none), planes, rows), zeros(rows[-1].shape[0])]
            return torch.cat(crops)[torch.argsort(torch.cat(rows))]
        # Crops are large: each is written to its place, and none is copied into another order.
        written = zeros(len(boxes))
        most = len(boxes) + 1 if _need_graph(features) else _regions_at_once(len(boxes))
        for level, feature in enumerate(features):
            # Coordinates in float32: in half precision a box of 500 px is off by pixels.
            plane = feature.float().contiguous()
            for own in rows[level].split(most):
                written = written.index_copy_(0, own, pool(level, plane, own))
        return written

    def pool_rows(
        self, pyramid: Pyramid, boxes: Tensor, image_index: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Pool regions in the order and layout of the kernel, with channels side by side.

        Args:
            pyramid: with a table.
            boxes: as in ``forward``.
            image_index: as in ``forward``.

        Returns:
            ``[R, P * P * C]``, row r of region ``order[r]``; and ``order``, int64 ``[R]``, or
            ``None`` for the order of the regions. See ``in_region_order``.
        """
        assert pyramid.table is not None
        self._compute_tiles(pyramid, boxes, image_index)
        sizes = tuple((level.shape[-2], level.shape[-1]) for level in pyramid.features)
        first_rows = tuple(map(tuple, pyramid.first_rows))
        device = boxes.device
        arguments = (
            pyramid.table,
            boxes,
            image_index,
            device_constant(first_rows, torch.int64, device),  # [N, L]
            device_constant(sizes, torch.int64, device),  # [L, 2]
        )
        settings: dict[str, Any] = {
            "min_level": self.min_level,
            "bins": self.output_size,
            "sampling_ratio": self.sampling_ratio,
            "aligned": self.aligned,
        }
        if self.kernel == "bags" or device.type == "cpu":
            return pool_bags_of_levels(*arguments, **settings)
        return pool_levels(*arguments, **settings).flatten(1), None


def in_region_order(rows: Tensor, order: Tensor | None) -> Tensor:
    """Rows ``[R, ...]`` of the regions ``order``, as ``pool_rows`` returns it, region by region."""
    return rows if order is None else torch.empty_like(rows).index_copy_(0, order, rows)


def _need_graph(features: Sequence[FeatureMap]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(level, Tensor) and level.requires_grad for level in features
    )


def _regions_at_once(count: int) -> int:
    """Regions of one call of torchvision's kernel, so that few crops live twice: 256 fill a GPU."""
    return max(256, math.ceil(count / 4))

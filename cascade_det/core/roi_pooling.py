"""RoIAlign over a feature pyramid.

Shapes: N images, L levels, C channels, R regions of the whole batch, P bins per side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from cascade_det.core.roi_bags import make_table, pool_bags
from cascade_det.core.structures.on_device import indices_by_group, is_recorded

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
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])  # [R]
    sizes = torch.sqrt(areas)
    levels = torch.floor(CANONICAL_LEVEL + torch.log2(sizes / CANONICAL_BOX_SIZE + 1e-8))
    return torch.clamp(levels, min=min_level, max=max_level).to(torch.int64) - min_level


@dataclass
class Pyramid:
    """A feature pyramid prepared for pooling, once per batch.

    Attributes:
        features: L maps ``[N, C, H_l, W_l]``, finest first.
        table: ``[N * sum(H_l * W_l), C]``, the pixels of all maps, or ``None`` for the torchvision
            kernel.
        first_rows: ``[N][L]``, first table row of each map of each image.
        dtype: of crops by the torchvision kernel; ``None`` for that of the features.
    """

    features: list[Tensor]
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
        kernel: ``bags``, ``torchvision``, or ``auto`` (bags on the CPU, torchvision elsewhere).
            Under ``torch.jit.trace`` always torchvision's, because bags cannot be traced.

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
        """Lay out the feature maps for the chosen kernel.

        Args:
            features: L maps ``[N, C, H_l, W_l]``, finest first, as many as strides.
            dtype: of the ``bags`` kernel and its output; ``None`` for that of the features.

        Raises:
            ValueError: if the number of maps differs from the number of strides.
        """
        if len(features) != len(self.strides):
            raise ValueError(f"{len(features)} feature maps for {len(self.strides)} strides")
        has_fast_bags = features[0].device.type == "cpu"
        wants_bags = self.kernel == "bags" or (self.kernel == "auto" and has_fast_bags)
        if torch.jit.is_tracing():
            return Pyramid(features)
        if not wants_bags:
            # The kernel reads contiguous float32 maps: made here, once for all stages.
            planes = [level.float().contiguous() for level in features]
            return Pyramid(planes, dtype=features[0].dtype)
        levels = [level.to(dtype or level.dtype) for level in features]
        return Pyramid(features, *make_table(levels))

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
            return self._pool_with_torchvision(pyramid, boxes, image_index)
        size = self.output_size
        rows, order = self.pool_rows(pyramid, boxes, image_index)  # [R, P * P * C], [R]
        return rows[torch.argsort(order)].unflatten(1, (size, size, -1)).permute(0, 3, 1, 2)

    def _levels(self, boxes: Tensor) -> Tensor:
        return assign_levels(boxes, min_level=self.min_level, max_level=self.max_level)

    def _pool_with_torchvision(
        self, pyramid: Pyramid, boxes: Tensor, image_index: Tensor
    ) -> Tensor:
        features, size = pyramid.features, self.output_size
        dtype = pyramid.dtype or features[0].dtype
        levels, none = self._levels(boxes), len(features)
        # A box with NaN has no level and pools zeros.
        levels = levels.where((levels >= 0) & (levels < none), none)
        rows = indices_by_group(levels, none + 1)
        regions = torch.cat([image_index[:, None].to(boxes.dtype), boxes], dim=1)  # [R, 5]

        def pool(level: int) -> Tensor:
            # Coordinates in float32: in half precision a box of 500 px is off by pixels.
            pooled = roi_align(
                features[level].float(),
                regions[rows[level]],
                size,
                1.0 / self.strides[level],
                self.sampling_ratio,
                self.aligned,
            )
            return pooled.to(dtype)  # [R_l, C, P, P]

        def zeros(count: int) -> Tensor:
            return features[0].new_zeros(count, features[0].shape[1], size, size, dtype=dtype)

        if is_recorded():
            crops = [*map(pool, range(none)), zeros(rows[-1].shape[0])]
            return torch.cat(crops)[torch.argsort(torch.cat(rows))]
        # Crops are large: each is written to its place, and none is copied into another order.
        written = zeros(len(boxes))
        for level in range(none):
            written = written.index_copy_(0, rows[level], pool(level))
        return written

    def pool_rows(
        self, pyramid: Pyramid, boxes: Tensor, image_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pool regions in the order and layout of the ``bags`` kernel.

        Args:
            pyramid: with a table.
            boxes: as in ``forward``.
            image_index: as in ``forward``.

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
        sizes = torch.tensor([f.shape[-2:] for f in pyramid.features], device=device)  # [L, 2]
        return pool_bags(
            pyramid.table,
            boxes,
            sizes[levels],
            torch.tensor(pyramid.first_rows, device=device)[image_index, levels],
            torch.tensor([1.0 / s for s in self.strides], device=device)[levels],
            output_size=size,
            sampling_ratio=self.sampling_ratio,
            aligned=self.aligned,
        )

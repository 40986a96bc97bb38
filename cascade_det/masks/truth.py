"""The masks of a batch's objects as targets of a mask head.

An object's mask is one of

- a list of polygons, float64 tensors ``[2 n]`` (x, y, x, y, ...; n >= 3) in pixels of its image;
- a bool tensor ``[H, W]``, the bitmap of its image;
- ``None``: its mask is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import roi_align

from cascade_det.masks.polygons import draw_polygons

ObjectMask: TypeAlias = list[Tensor] | Tensor | None

_SMALLEST_SIDE = 0.1  # pixels, as in Detectron2
_UNSURE = 1e-4  # of a mean of pixels; that of float32 is below 1e-5


class ObjectMasks:
    """The masks of G objects.

    Args:
        masks: one for each object.
        device: of the targets.
    """

    def __init__(self, masks: Sequence[ObjectMask], device: torch.device | str = "cpu") -> None:
        self.masks = list(masks)
        self.known = torch.tensor([m is not None for m in masks], dtype=torch.bool, device=device)

    def crop(self, objects: Tensor, boxes: Tensor, size: int) -> Tensor:
        """The part of each mask inside a box, as Detectron2's ``crop_and_resize``.

        Polygons are drawn on a grid of M x M inside the box; bitmaps are pooled by RoIAlign (arXiv
        1703.06870, section 3) with threshold 0.5.

        Args:
            objects: int64 ``[F]`` in ``[0, G)``, with a known mask each.
            boxes: float32 ``[F, 4]``, XYXY in absolute pixels.
            size: M.

        Returns:
            Bool ``[F, M, M]`` on the device of the boxes.
        """
        targets = torch.zeros(len(boxes), size, size, dtype=torch.bool)
        on_cpu = boxes.detach().cpu()
        rows_of: dict[int, list[int]] = {}
        for row, index in enumerate(objects.tolist()):
            rows_of.setdefault(index, []).append(row)
        for index, rows in rows_of.items():
            mask = self.masks[index]
            assert mask is not None
            if isinstance(mask, Tensor):
                targets[rows] = _crop_bitmap(mask, on_cpu[rows], size)
            else:
                polygons = [polygon.numpy() for polygon in mask]
                for row in rows:
                    targets[row] = _draw_polygons(polygons, on_cpu[row].numpy(), size)
        return targets.to(boxes.device)


def _crop_bitmap(bitmap: Tensor, boxes: Tensor, size: int) -> Tensor:
    """RoIAlign with threshold 0.5: bool ``[F, M, M]``.

    RoIAlign is separable, and as two matrix products faster than its kernel, which is made for
    many channels. Where rounding could tell, the kernel decides.
    """
    pixels = bitmap.numpy()
    pooled = np.stack([_pool(pixels, box, size) for box in boxes.numpy()])
    unsure = np.flatnonzero((np.abs(pooled - 0.5) < _UNSURE).any(axis=(1, 2)))
    if len(unsure):
        regions = torch.cat([torch.zeros(len(unsure), 1), boxes[unsure]], dim=1)  # [U, 5]
        whole = bitmap.to(torch.float32)[None, None]
        pooled[unsure] = roi_align(whole, regions, size, 1.0, 0, True)[:, 0].numpy()
    return torch.from_numpy(pooled >= 0.5)


def _pool(pixels: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    left, across = _samples(box[0], box[2], pixels.shape[1], size)
    top, down = _samples(box[1], box[3], pixels.shape[0], size)
    window = pixels[top : top + down.shape[1], left : left + across.shape[1]]
    return down @ window.astype(np.float32) @ across.T


def _samples(low: np.float32, high: np.float32, length: int, size: int) -> tuple[int, np.ndarray]:
    """The first pixel that RoIAlign reads along one axis, and float32 ``[M, n]``, the weights."""
    per_cell = int(np.ceil((high - low) / size))
    if per_cell <= 0:
        return 0, np.zeros((size, 0), np.float32)
    step = float(high - low) / (size * per_cell)
    at = float(low) - 0.5 + (np.arange(size * per_cell) + 0.5) * step
    inside = (at >= -1) & (at <= length)
    at = at.clip(0, length - 1)
    lower = at.astype(np.int64)
    upper = np.minimum(lower + 1, length - 1)
    first = int(lower[0])
    count = int(upper[-1]) - first + 1
    rows = np.arange(size * per_cell) // per_cell * count - first
    above = (at - lower) * inside / per_cell
    entries = np.concatenate([rows + lower, rows + upper])
    weights = np.concatenate([inside / per_cell - above, above])
    summed = np.bincount(entries, weights, size * count).reshape(size, count)
    return first, summed.astype(np.float32)


def _draw_polygons(polygons: Sequence[np.ndarray], box: np.ndarray, size: int) -> Tensor:
    # Float32 sides and float64 corners, as in Detectron2, for the same cells.
    scale_x, scale_y = (
        size / max(side, _SMALLEST_SIDE) for side in (box[2] - box[0], box[3] - box[1])
    )
    moved = []
    for polygon in polygons:
        points = polygon.astype(np.float64).reshape(-1, 2) - box[:2]
        moved.append((points * (scale_x, scale_y)).ravel())
    return torch.from_numpy(draw_polygons(moved, size, size))

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
    regions = torch.cat([boxes.new_zeros(len(boxes), 1), boxes], dim=1)  # [F, 5]
    pixels = bitmap.to(torch.float32)[None, None]
    cropped = roi_align(pixels, regions, size, 1.0, 0, True)  # [F, 1, M, M]
    return cropped[:, 0] >= 0.5


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

"""An image with its objects, as augmentation changes it: moved, cut and put together.

A mask is, as in a sample, a list of polygons (float64 ``[2 n]``), a bitmap (bool ``[H, W]``), or
``None`` if it is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cascade_det.data.coco import ImageRecord
from cascade_det.data.transforms import EMPTY_SIDE, Pixels
from cascade_det.masks.clipping import clip_polygons
from cascade_det.masks.polygons import Polygon, draw_polygons
from cascade_det.masks.segmentation import draw

Bitmap = npt.NDArray[np.bool_]
SceneMask = list[Polygon] | Bitmap | None
Matrix = npt.NDArray[np.float64]
# Moves bitmaps bool [B, H, W].
MoveBitmaps = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Scene:
    """An image and its G objects, without crowds.

    Attributes:
        image: uint8 ``[3, H, W]``, RGB.
        boxes: float64 ``[G, 4]``, XYXY in pixels.
        classes: int64 ``[G]``.
        masks: length G; ``None`` if masks were not read.
    """

    image: Tensor
    boxes: npt.NDArray[np.float64]
    classes: npt.NDArray[np.int64]
    masks: list[SceneMask] | None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.image.shape[1:]
        return height, width

    @classmethod
    def of(cls, image: Pixels, image_format: str, record: ImageRecord) -> Scene:
        """The scene of an image ``[H, W, 3]`` with the channels of ``image_format``."""
        keep = np.flatnonzero(~record.iscrowd)
        masks: list[SceneMask] | None = None
        if record.masks is not None:
            masks = []
            for index in keep:
                mask = record.masks[index]
                is_rle = isinstance(mask, dict)
                masks.append(draw(mask, record.height, record.width) if is_rle else mask)  # type: ignore[arg-type]
        rgb = image if image_format == "RGB" else image[:, :, ::-1]
        channels_first = torch.from_numpy(np.array(rgb.transpose(2, 0, 1), order="C"))
        boxes = record.boxes[keep].astype(np.float64)
        return cls(channels_first, boxes, record.classes[keep], masks)

    def pixels(self, image_format: str) -> Pixels:
        """The image ``[H, W, 3]`` with the channels of ``image_format``."""
        pixels: Pixels = self.image.permute(1, 2, 0).numpy()
        return pixels if image_format == "RGB" else pixels[:, :, ::-1]

    def select(self, keep: npt.NDArray[np.bool_]) -> Scene:
        """The scene with some of the objects; bool ``[G]``."""
        masks = self.masks
        if masks is not None:
            masks = [mask for mask, kept in zip(masks, keep, strict=True) if kept]
        return replace(self, boxes=self.boxes[keep], classes=self.classes[keep], masks=masks)

    def moved(
        self,
        image: Tensor,
        boxes: npt.NDArray[np.float64],
        matrix: Matrix,
        move_bitmaps: MoveBitmaps,
    ) -> Scene:
        """The scene after a transform, clipped to the image.

        Objects with an empty box are dropped, as are those of whose known mask nothing is left.

        Args:
            image: the new image.
            boxes: the new boxes, in the order of the old ones.
            matrix: ``[2, 3]``; takes a point (x, y, 1) of the old image to the new one.
            move_bitmaps: takes the bitmaps bool ``[B, H, W]`` of the old image to the new one.
        """
        height, width = image.shape[1:]
        masks = self.masks
        if masks is not None:
            masks = _move(masks, matrix, move_bitmaps, height, width)
        boxes = boxes.clip(0, [width, height] * 2)
        wide, high = (boxes[:, 2:] - boxes[:, :2] > EMPTY_SIDE).T
        keep = wide & high
        if masks is not None:
            keep &= np.array([_is_left(mask) for mask in masks], np.bool_)
        return Scene(image, boxes, self.classes, masks).select(keep)

    def cropped(self, top: int, left: int, height: int, width: int) -> Scene:
        """The part of the scene within a rectangle of the image."""
        rows, columns = slice(top, top + height), slice(left, left + width)
        matrix = np.array([[1.0, 0, -left], [0, 1, -top]])
        return self.moved(
            self.image[:, rows, columns],
            self.boxes - [left, top] * 2,
            matrix,
            lambda bitmaps: bitmaps[:, rows, columns],
        )


def bitmap_of(mask: list[Polygon] | Bitmap, height: int, width: int) -> Bitmap:
    """The bitmap of a known mask, bool ``[H, W]``."""
    return draw_polygons(mask, height, width) if isinstance(mask, list) else mask


def transformed_points(points: npt.NDArray[np.float64], matrix: Matrix) -> npt.NDArray[np.float64]:
    """Points ``[P, 2]`` (x, y) taken by a matrix ``[2, 3]``."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def transformed_boxes(boxes: npt.NDArray[np.float64], matrix: Matrix) -> npt.NDArray[np.float64]:
    """The boxes around boxes ``[G, 4]`` taken by a matrix ``[2, 3]``."""
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2)
    moved = transformed_points(corners, matrix).reshape(-1, 4, 2)
    return np.concatenate([moved.min(axis=1), moved.max(axis=1)], axis=1)


def _is_left(mask: SceneMask) -> bool:
    return mask is None or (bool(mask.any()) if isinstance(mask, np.ndarray) else len(mask) > 0)


def _move(
    masks: Sequence[SceneMask],
    matrix: Matrix,
    move_bitmaps: MoveBitmaps,
    height: int,
    width: int,
) -> list[SceneMask]:
    bitmaps = [mask for mask in masks if isinstance(mask, np.ndarray)]
    moved = iter(())
    if bitmaps:
        moved = iter(move_bitmaps(torch.from_numpy(np.stack(bitmaps))).numpy())
    return [
        _move_polygons(mask, matrix, height, width)
        if isinstance(mask, list)
        else (None if mask is None else next(moved))
        for mask in masks
    ]


def _move_polygons(
    polygons: list[Polygon], matrix: Matrix, height: int, width: int
) -> list[Polygon]:
    points = (transformed_points(polygon.reshape(-1, 2), matrix) for polygon in polygons)
    return clip_polygons([moved.reshape(-1) for moved in points], height, width)

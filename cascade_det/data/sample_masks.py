"""The masks of a sample: moved with its image, and packed on their way out of a worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cascade_det.data.scene import SceneMask
from cascade_det.data.transforms import EMPTY_SIDE, Boxes, Placement
from cascade_det.masks.clipping import bitmap_box, polygons_box
from cascade_det.masks.polygons import draw_polygons
from cascade_det.masks.segmentation import Segmentation, draw
from cascade_det.masks.truth import ObjectMask


class MaskOptions(NamedTuple):
    """What becomes of masks.

    Attributes:
        mask_format: ``"polygon"`` keeps polygons, ``"bitmask"`` draws them on the resized image.
            RLE becomes a bitmap with either.
        maskless: ``"keep"`` or ``"drop"`` objects whose bitmap has no pixel left.
    """

    mask_format: str = "polygon"
    maskless: str = "keep"


class PackedMasks(NamedTuple):
    """Masks without a tensor for each, because every tensor takes a file descriptor of its own.

    Attributes:
        polygons: for each object its polygons, or ``None`` if it has none.
        is_bitmap: for each object whether it has a bitmap.
        bitmaps: bool ``[B, H, W]`` of the objects that have one; ``None`` for B = 0.
    """

    polygons: list[list[npt.NDArray[np.float64]] | None]
    is_bitmap: list[bool]
    bitmaps: Tensor | None


def place_masks(
    masks: Sequence[Segmentation | SceneMask], placement: Placement, options: MaskOptions
) -> tuple[list[ObjectMask], npt.NDArray[np.bool_]]:
    """Move masks with their image, bit-equal to Detectron2.

    Args:
        masks: of G objects, in pixels of the image before: polygons, RLE or bitmaps.
        placement: where the pixels of the image went.
        options: what becomes of them.

    Returns:
        The masks as in :mod:`cascade_det.masks.truth`, and bool ``[G]``, false for objects to drop.
    """
    placed = [mask if mask is None else _place(mask, placement, options) for mask in masks]
    empty = [isinstance(mask, Tensor) and not mask.any() for mask in placed]
    if options.maskless == "drop":
        return placed, ~np.array(empty, np.bool_)
    known = [None if none else mask for mask, none in zip(placed, empty, strict=True)]
    return known, np.ones(len(known), np.bool_)


def boxes_of_masks(
    boxes: Boxes, masks: Sequence[ObjectMask]
) -> tuple[Boxes, npt.NDArray[np.bool_]]:
    """The boxes around masks that lie within their image, as Detectron2 has them after a crop.

    Args:
        boxes: float32 ``[G, 4]``, kept for objects whose mask is unknown.
        masks: length G.

    Returns:
        Boxes float32 ``[G, 4]``, and bool ``[G]``, false for empty ones.
    """
    found = boxes.copy()
    for index, mask in enumerate(masks):
        if isinstance(mask, Tensor):
            found[index] = bitmap_box(mask.numpy())
        elif mask is not None:
            found[index] = polygons_box([polygon.numpy() for polygon in mask])
    return found, (found[:, 2:] - found[:, :2] > EMPTY_SIDE).all(axis=1)


def pack(masks: Sequence[ObjectMask]) -> PackedMasks:
    """See :class:`PackedMasks`."""
    bitmaps = [mask for mask in masks if isinstance(mask, Tensor)]
    return PackedMasks(
        [[p.numpy() for p in mask] if isinstance(mask, list) else None for mask in masks],
        [isinstance(mask, Tensor) for mask in masks],
        torch.stack(bitmaps) if bitmaps else None,
    )


def unpack(packed: PackedMasks) -> list[ObjectMask]:
    """The reverse of :func:`pack`."""
    bitmaps = iter(() if packed.bitmaps is None else packed.bitmaps)
    masks: list[ObjectMask] = []
    for polygons, is_bitmap in zip(packed.polygons, packed.is_bitmap, strict=True):
        if is_bitmap:
            masks.append(next(bitmaps))
        else:
            masks.append(None if polygons is None else [torch.from_numpy(p) for p in polygons])
    return masks


def _place(
    mask: Segmentation | npt.NDArray[np.bool_], placement: Placement, options: MaskOptions
) -> ObjectMask:
    if isinstance(mask, dict):
        mask = draw(mask, *placement.old)
    if isinstance(mask, np.ndarray):
        return _tensor(placement.bitmap(mask))
    moved = [placement.points(polygon.reshape(-1, 2)).reshape(-1) for polygon in mask]
    if options.mask_format == "polygon":
        return [torch.from_numpy(polygon) for polygon in moved]
    return _tensor(draw_polygons(moved, *placement.new))


def _tensor(bitmap: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(bitmap))

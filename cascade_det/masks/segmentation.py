"""The masks of a COCO-format json, checked before pycocotools' C code sees them; no PyTorch.

A mask is a list of polygons (see :mod:`cascade_det.masks.polygons`) in pixels of its image, or
compressed RLE (see :mod:`cascade_det.masks.rle`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from cascade_det.masks.polygons import Polygon, can_be_walked, draw_polygons, is_flat
from cascade_det.masks.rle import Rle, compressed

Segmentation: TypeAlias = list[Polygon] | Rle

NO_MASK = "object without a mask"
BAD_POLYGON = "polygon of fewer than 3 points, or of half a point (left out)"
NO_AREA = "mask of no area"

_COORDINATE_LIMIT = 1e6  # beyond any image, in pixels
_SHORTEST = 6  # coordinates


def compact_polygons(entry: dict[str, Any]) -> dict[str, Any]:
    """Replace the polygons of an annotation by arrays, a third of the size of json's lists.

    Anything but lists of numbers stays for :func:`parse_segmentation`.
    """
    polygons = entry.get("segmentation")
    if isinstance(polygons, list):
        with suppress(TypeError, ValueError, OverflowError):
            entry["segmentation"] = [array("d", polygon) for polygon in polygons]
    return entry


def parse_segmentation(
    value: Any, height: int, width: int, note: Callable[[str], object]
) -> Segmentation | None:
    """Check the ``segmentation`` of an annotation.

    Polygons that Detectron2 leaves out are left out: of fewer than 3 points, or with an odd number
    of coordinates.

    Args:
        value: of a json that was read with :func:`compact_polygons`.
        height: of the image in pixels.
        width: of the image in pixels.
        note: called with the kind of what is odd about a mask, and allowed.

    Returns:
        The mask; ``None`` if there is none.

    Raises:
        ValueError: it is no mask of this image; the message is the kind of issue.
    """
    if value is None or value in ([], {}):
        note(NO_MASK)
        return None
    if isinstance(value, dict):
        try:
            mask: Segmentation = compressed(value, height, width)
        except ValueError as error:
            raise ValueError(f"mask whose RLE {error}") from error
    else:
        mask = _parse_polygons(value, note)
    if not mask:
        note(NO_MASK)
        return None
    if covers_nothing(mask):
        note(NO_AREA)
    return mask


def covers_nothing(mask: Segmentation) -> bool:
    """Whether a mask has no area, or no pixel."""
    if isinstance(mask, dict):
        return int(coco_mask.area(mask)) == 0
    return all(map(is_flat, mask))


def draw(mask: Segmentation, height: int, width: int) -> npt.NDArray[np.bool_]:
    """The bitmap of a mask: bool ``[height, width]``, the size that its RLE has."""
    if isinstance(mask, dict):
        return coco_mask.decode(mask).view(np.bool_)
    return draw_polygons(mask, height, width)


def plain_segmentation(mask: Segmentation, height: int, width: int) -> list[Any] | dict[str, Any]:
    """A mask as a json has it, which pycocotools can draw."""
    if isinstance(mask, dict):
        return mask
    if can_be_walked(mask):
        return [polygon.tolist() for polygon in mask]
    return _encode(draw_polygons(mask, height, width))


def mask_area(mask: Segmentation, height: int, width: int) -> int:
    """Pixels of a mask."""
    if isinstance(mask, dict):
        return int(coco_mask.area(mask))
    return int(np.count_nonzero(draw_polygons(mask, height, width)))


def _encode(bitmap: npt.NDArray[np.bool_]) -> Rle:
    rle = coco_mask.encode(np.asfortranarray(bitmap, np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def _parse_polygons(value: Any, note: Callable[[str], object]) -> list[Polygon]:
    if not isinstance(value, list):
        raise ValueError("mask that is neither polygons nor RLE")
    if not all(isinstance(polygon, array) for polygon in value):
        raise ValueError("mask whose polygons are not lists of numbers, [[x, y, x, y, ...], ...]")
    polygons = [
        np.frombuffer(points, np.float64)
        for points in value
        if len(points) >= _SHORTEST and len(points) % 2 == 0
    ]
    if len(polygons) < len(value):
        note(BAD_POLYGON)
    for polygon in polygons:
        if not np.abs(polygon).max() <= _COORDINATE_LIMIT:  # NaN fails the comparison
            raise ValueError("polygon with a coordinate that is not a finite number within 1e6")
    return polygons

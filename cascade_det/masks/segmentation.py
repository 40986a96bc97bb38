"""The masks of a COCO-format json, checked before pycocotools' C code sees them; no PyTorch.

A mask is a list of polygons (see :mod:`cascade_det.masks.polygons`) in pixels of its image, or
pycocotools' compressed RLE: a dict with ``size`` ``[height, width]`` and ``counts``, bytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from cascade_det.masks.polygons import Polygon, can_be_walked, draw_polygons, is_flat


class Rle(TypedDict):
    """Run-length encoding, column by column, as pycocotools writes it."""

    size: list[int]
    counts: bytes


Segmentation: TypeAlias = list[Polygon] | Rle

NO_MASK = "object without a mask"
BAD_POLYGON = "polygon of fewer than 3 points, or of half a point (left out)"
NO_AREA = "mask of no area"

_COORDINATE_LIMIT = 1e6  # beyond any image, in pixels
_MOST_PIXELS = 2**28  # of an RLE; Pillow opens no image as large
_CHARACTERS = 6  # of a run of at most so many pixels, 5 bits each
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
    if isinstance(value, dict) and value:
        return _parse_rle(value, height, width, note)
    if value is not None and not isinstance(value, list | dict):
        raise ValueError("mask that is neither polygons nor RLE")
    if any(not isinstance(part, array) for part in value or ()):
        raise ValueError("mask whose polygons are not lists of numbers, [[x, y, x, y, ...], ...]")
    parts: list[array[float]] = [p for p in value or () if len(p) >= _SHORTEST and not len(p) % 2]
    if len(parts) < len(value or ()):
        note(BAD_POLYGON)
    polygons = [np.frombuffer(part, np.float64) for part in parts]
    for polygon in polygons:
        if not np.abs(polygon).max() <= _COORDINATE_LIMIT:  # NaN fails the comparison
            raise ValueError("polygon with a coordinate that is not a finite number within 1e6")
    if not polygons:
        note(NO_MASK)
        return None
    if all(map(is_flat, parts)):
        note(NO_AREA)
    return polygons


def covers_nothing(mask: Segmentation) -> bool:
    """Whether a mask has no area, or no pixel."""
    if isinstance(mask, dict):
        return int(coco_mask.area(mask)) == 0
    return all(map(is_flat, mask))


def draw(mask: Segmentation, height: int, width: int) -> npt.NDArray[np.bool_]:
    """The bitmap of a mask, bool ``[height, width]``, which are those of the RLE."""
    if isinstance(mask, dict):
        return coco_mask.decode(mask).view(np.bool_)
    return draw_polygons(mask, height, width)


def plain_segmentation(mask: Segmentation, height: int, width: int) -> list[Any] | dict[str, Any]:
    """A mask as a json has it, which pycocotools can draw."""
    if isinstance(mask, list) and can_be_walked(mask):
        return [polygon.tolist() for polygon in mask]
    rle = mask if isinstance(mask, dict) else _encode(draw(mask, height, width))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def mask_area(mask: Segmentation, height: int, width: int) -> int:
    """Pixels of a mask."""
    rle = mask if isinstance(mask, dict) else _encode(draw(mask, height, width))
    return int(coco_mask.area(rle))


def _encode(bitmap: npt.NDArray[np.bool_]) -> Rle:
    rle: Rle = coco_mask.encode(np.asfortranarray(bitmap, np.uint8))
    return rle


def _parse_rle(
    value: dict[str, Any], height: int, width: int, note: Callable[[str], object]
) -> Rle:
    size, counts, pixels = value.get("size"), value.get("counts"), height * width
    if not isinstance(size, list) or [type(side) for side in size] != [int, int]:
        raise ValueError("RLE mask without a 'size', [height, width]")
    if size != [height, width]:
        raise ValueError("RLE mask whose 'size' is not [height, width] of its image")
    if pixels > _MOST_PIXELS:
        raise ValueError("RLE mask of an enormous image")
    runs = _runs_of_text(counts) if isinstance(counts, str) else _runs_of_list(counts, pixels)
    if runs is None:
        raise ValueError("RLE mask whose 'counts' cannot be read")
    if (runs < 0).any() or (runs > pixels).any() or runs.sum() != pixels:
        raise ValueError("RLE mask whose 'counts' do not add up to the pixels of its image")
    if not runs[1::2].any():
        note(NO_AREA)
    if isinstance(counts, str):
        return {"size": size, "counts": counts.encode("ascii")}
    rle: Rle = coco_mask.frPyObjects({"size": size, "counts": runs.tolist()}, *size)
    return rle


def _runs_of_list(counts: Any, pixels: int) -> npt.NDArray[np.int64] | None:
    if not isinstance(counts, list) or any(
        type(run) is not int or not 0 <= run <= pixels for run in counts
    ):
        return None
    return np.array(counts, np.int64)


def _runs_of_text(counts: str) -> npt.NDArray[np.int64] | None:
    """The runs of a compressed RLE; ``None`` if it is malformed.

    Each number is written in groups of 5 bits, lowest first, as characters from "0" on. Bit 5 says
    that another follows, and bit 4 of the last is the sign. From the fourth number on, it is the
    difference to the one before the last.
    """
    if not counts or not counts.isascii():
        return None
    codes = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - ord("0")
    ends = np.flatnonzero((codes & 32) == 0)
    if codes.min() < 0 or codes.max() > 63 or not len(ends) or ends[-1] != len(codes) - 1:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _CHARACTERS:
        return None
    places = np.arange(len(codes)) - starts.repeat(lengths)
    runs = np.add.reduceat((codes & 31) << (5 * places), starts)
    runs -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs

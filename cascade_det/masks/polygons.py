"""Draws polygons into bitmaps; needs no PyTorch.

A polygon is float64 ``[2 n]`` (x, y, x, y, ...) in pixels, where pixel (i, j) covers
``[i, i + 1) x [j, j + 1)``. Where it crosses itself, it is filled by the even-odd rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

Polygon = npt.NDArray[np.float64]

# In pixels. pycocotools walks along every edge, in steps of a fifth of a pixel that it keeps in
# memory, and counts them in 32 bits.
_LONGEST, _FARTHEST = 1e6, 1e6
_CROSSINGS_AT_ONCE = 2**20


def draw_polygons(polygons: Sequence[Polygon], height: int, width: int) -> npt.NDArray[np.bool_]:
    """The union of polygons as a bitmap.

    Args:
        polygons: finite, of 3 points and more.
        height: in pixels.
        width: in pixels.

    Returns:
        Bool ``[height, width]``, to the bit what pycocotools draws, and so Detectron2. Outlines
        that would exhaust the memory there are filled by pixel centres here.
    """
    if not polygons:
        return np.zeros((height, width), np.bool_)
    if can_be_walked(polygons):
        drawn = coco_mask.frPyObjects(list(polygons), height, width)
        merged = coco_mask.merge(drawn) if len(drawn) > 1 else drawn[0]
        return coco_mask.decode(merged).view(np.bool_)
    parts = [_fill(polygon.reshape(-1, 2), height, width) for polygon in polygons]
    return np.logical_or.reduce(parts)


def can_be_walked(polygons: Sequence[Polygon]) -> bool:
    """Whether outlines are short and close enough for pycocotools."""
    numbers = polygons[0] if len(polygons) == 1 else np.concatenate(polygons)
    reach = float(np.abs(numbers).max())
    if reach > _FARTHEST:
        return False
    if len(numbers) * reach <= _LONGEST:  # no shorter than the outline
        return True
    steps = (np.diff(p.reshape(-1, 2), axis=0, append=p[None, :2]) for p in polygons)
    return sum(float(np.abs(step).max(axis=1).sum()) for step in steps) <= _LONGEST


def is_flat(polygon: Sequence[float] | Polygon) -> bool:
    """Whether all points of a polygon are on one line, so that it has no area."""
    x, y = polygon[0], polygon[1]
    along_x = along_y = 0.0
    for i in range(2, len(polygon), 2):
        step_x, step_y = polygon[i] - x, polygon[i + 1] - y
        if along_x * step_y != along_y * step_x:
            return False
        if along_x == along_y == 0:
            along_x, along_y = step_x, step_y
    return True


def is_outside_image(polygons: Sequence[Polygon], height: int, width: int) -> bool:
    """Whether all polygons are on one side of an image, whose pixels they cannot cover."""
    points = np.concatenate(polygons).reshape(-1, 2)
    (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
    return bool(right <= 0 or bottom <= 0 or left >= width or top >= height)


def crosses_itself(polygon: Polygon) -> bool:
    """Whether two edges of a polygon cross, other than by touching."""
    starts = polygon.reshape(-1, 2)
    ends = np.roll(starts, -1, axis=0)
    at_once = max(_CROSSINGS_AT_ONCE // len(starts), 1)
    for first in range(0, len(starts), at_once):
        start, end = starts[first : first + at_once, None], ends[first : first + at_once, None]
        apart = _side(start, end, starts) * _side(start, end, ends) < 0  # [edges here, n]
        if (apart & (_side(starts, ends, start) * _side(starts, ends, end) < 0)).any():
            return True
    return False


def _side(
    start: npt.NDArray[np.float64], end: npt.NDArray[np.float64], points: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """On which side of the lines from ``start`` to ``end`` points are: -1, 0 or 1."""
    along, to = end - start, points - start
    return np.sign(along[..., 0] * to[..., 1] - along[..., 1] * to[..., 0])


def _fill(points: npt.NDArray[np.float64], height: int, width: int) -> npt.NDArray[np.bool_]:
    """Fill one polygon ``[n, 2]``: the pixels whose centre is inside."""
    flips = np.zeros((width, height + 1), np.int64)
    centres = np.arange(width) + 0.5
    following = np.roll(points, -1, axis=0)
    at_once = max(_CROSSINGS_AT_ONCE // width, 1)
    for start in range(0, len(points), at_once):
        (x0, y0), (x1, y1) = (p[start : start + at_once].T for p in (points, following))
        edge, column = np.nonzero((x0[:, None] <= centres) != (x1[:, None] <= centres))
        along = (centres[column] - x0[edge]) / (x1[edge] - x0[edge])
        crossing = y0[edge] + along * (y1[edge] - y0[edge])
        row = np.clip(np.ceil(crossing - 0.5), 0, height).astype(np.int64)
        np.add.at(flips, (column, row), 1)
    return np.cumsum(flips, axis=1)[:, :-1].T % 2 == 1

"""Cuts polygons to a rectangle, and finds the box of a mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cascade_det.masks.polygons import Polygon

Points = npt.NDArray[np.float64]

_FEWEST = 3  # points of a polygon


def clip_polygons(polygons: Sequence[Polygon], height: float, width: float) -> list[Polygon]:
    """The parts of polygons within ``[0, width] x [0, height]``; none is left of those outside.

    Args:
        polygons: float64 ``[2 n]`` each (x, y, x, y, ...), in pixels.
        height: of the rectangle.
        width: of the rectangle.
    """
    clipped = (_clip(polygon.reshape(-1, 2), (width, height)) for polygon in polygons)
    return [points.reshape(-1) for points in clipped if len(points) >= _FEWEST]


def polygons_box(polygons: Sequence[Polygon]) -> Points:
    """The box around polygons, float64 ``[4]``, XYXY; zeros if there is none."""
    if not polygons:
        return np.zeros(4)
    points = np.concatenate(polygons).reshape(-1, 2)
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


def bitmap_box(bitmap: npt.NDArray[np.bool_]) -> Points:
    """The box around the pixels of a bitmap ``[H, W]``: float64 ``[4]``, XYXY; zeros for none."""
    rows, columns = (np.flatnonzero(bitmap.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return np.zeros(4)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)


def _clip(points: Points, limits: tuple[float, float]) -> Points:
    """Sutherland and Hodgman: one side of the rectangle after the other; points ``[n, 2]``."""
    if ((points >= 0) & (points <= limits)).all():
        return points
    for axis, limit in enumerate(limits):
        for side, sign in ((0.0, 1.0), (limit, -1.0)):
            points = _cut(points, axis, side, sign)
            if not len(points):
                return points
    return _without_spikes(points)


def _cut(points: Points, axis: int, side: float, sign: float) -> Points:
    """Keep what is not beyond one side."""
    inner = sign * (points[:, axis] - side)  # negative outside
    if (inner >= 0).all():
        return points
    following, inner_next = np.roll(points, -1, axis=0), np.roll(inner, -1)
    crosses = (inner < 0) != (inner_next < 0)
    share = inner / np.where(crosses, inner - inner_next, 1)
    crossings = points + share[:, None] * (following - points)
    crossings[:, axis] = side
    both = np.stack([points, crossings], axis=1).reshape(-1, 2)  # each point, then its crossing
    return both[np.stack([inner >= 0, crosses], axis=1).reshape(-1)]


def _without_spikes(points: Points) -> Points:
    """Drop points where the outline turns back on itself.

    Where an outline leaves the rectangle and comes back, it is led along the side, which may reach
    farther than the polygon and would enlarge its box.
    """
    while True:
        # Cuts repeat points on a side; of a repeated one no direction is known.
        points = points[(points != np.roll(points, -1, axis=0)).any(axis=1)]
        if len(points) < _FEWEST:
            return points[:0]
        to = np.roll(points, -1, axis=0) - points
        since = np.roll(to, 1, axis=0)
        crossed = since[:, 0] * to[:, 1] - since[:, 1] * to[:, 0]
        is_spike = (crossed == 0) & ((since * to).sum(axis=1) <= 0)
        # Of neighbours only the first: the second may no longer be one.
        first = is_spike & ~np.roll(is_spike, 1)
        if not first.any():
            if is_spike.all():
                return points[:0]
            return points
        points = points[~first]

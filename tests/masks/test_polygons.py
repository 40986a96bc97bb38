"""Polygons as bitmaps: pycocotools' own, and by hand where its memory would not suffice."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from cascade_det.masks.polygons import can_be_walked, crosses_itself, draw_polygons, is_flat


def random_polygons(seed, low, high, most_points=9):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(3, most_points, generator.integers(1, 4), endpoint=True)
    return [generator.uniform(low, high, 2 * size) for size in sizes]


def inside(polygon, x, y):
    """Whether a point is inside by the even-odd rule, one edge after the other."""
    count = 0
    points = polygon.reshape(-1, 2).tolist()
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        if (x0 <= x) != (x1 <= x):
            count += y0 + (x - x0) / (x1 - x0) * (y1 - y0) < y
    return count % 2 == 1


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 40))
def test_a_drawing_is_pycocotools(seed, height, width):
    polygons = random_polygons(seed, -20, 60)
    drawn = draw_polygons(polygons, height, width)
    rle = coco_mask.frPyObjects([p.tolist() for p in polygons], height, width)
    np.testing.assert_array_equal(drawn, coco_mask.decode(coco_mask.merge(rle)).astype(bool))
    assert drawn.dtype == np.bool_


def test_no_polygon_is_an_empty_bitmap():
    assert not draw_polygons([], 3, 5).any()
    assert draw_polygons([], 3, 5).shape == (3, 5)


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.sampled_from([30, 3e8, 1e300]))
def test_outlines_that_cannot_be_walked_are_filled_by_pixel_centres(seed, reach):
    polygons = random_polygons(seed, -reach, reach + 20)
    # Back and forth, and so even, but too long to be walked.
    detour = np.tile([0.0, 0.0, 1e5, 0.0], 20)
    polygons[0] = np.concatenate([polygons[0], polygons[0][-2:], detour, polygons[0][-2:]])
    height, width = 13, 17
    assert not can_be_walked(polygons)
    drawn = draw_polygons(polygons, height, width)
    expected = np.zeros((height, width), bool)
    for row in range(height):
        for column in range(width):
            expected[row, column] = any(inside(p, column + 0.5, row + 0.5) for p in polygons)
    np.testing.assert_array_equal(drawn, expected)


def test_many_long_edges_take_little_memory_and_time():
    zigzag = np.random.default_rng(0).uniform(0, 300, 200_000)
    drawn = draw_polygons([zigzag], 300, 300)  # pycocotools would take 1.5 GB
    assert 0.4 < drawn.mean() < 0.6


@pytest.mark.parametrize(
    ("points", "flat"),
    [
        ([1, 1, 5, 1, 5, 4], False),
        ([1, 1, 1, 1, 5, 1, 5, 4], False),
        ([0, 0, 4, 4, 4, 0, 0, 4], False),  # crosses itself, so that its parts cancel out
        ([1, 1, 3, 2, 5, 3, 1, 1], True),
        ([2, 7, 2, 9, 2, 1], True),
        ([3, 3, 3, 3, 3, 3], True),
    ],
)
def test_what_is_flat(points, flat):
    assert is_flat(np.array(points, float)) is flat


def segments_cross(a, b, c, d):
    """By solving for the point where both lines meet."""
    matrix = np.array([b - a, c - d]).T
    if np.linalg.det(matrix) == 0:
        return False
    along = np.linalg.solve(matrix, c - a)
    return bool(((along > 1e-12) & (along < 1 - 1e-12)).all())


@given(st.integers(0, 2**32))
def test_which_polygons_cross_themselves(seed):
    (polygon, *_) = random_polygons(seed, 0, 9, most_points=6)
    points = polygon.reshape(-1, 2)
    edges = list(zip(points, np.roll(points, -1, axis=0), strict=True))
    crossing = [segments_cross(*one, *other) for one in edges for other in edges]
    assert crosses_itself(polygon) is any(crossing)


def test_a_long_outline_is_searched_piece_by_piece():
    turns = np.linspace(0, 2 * np.pi, 1500, endpoint=False)
    circle = np.stack([np.cos(turns), np.sin(turns)], axis=1) * 100
    assert not crosses_itself(circle.ravel())
    circle[[750, 751]] = circle[[751, 750]]
    assert crosses_itself(circle.ravel())

"""Polygons cut to a rectangle, against single points."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cascade_det.masks.clipping import bitmap_box, clip_polygons, polygons_box

HEIGHT, WIDTH = 20, 30
coordinates = st.floats(-25, 45).map(lambda x: round(x, 2))
outlines = st.lists(st.tuples(coordinates, coordinates), min_size=3, max_size=8)


def is_inside(polygon, x, y):
    """Even-odd rule: count the edges to the right of a point."""
    points = polygon.reshape(-1, 2)
    inside = False
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0):
            inside = not inside
    return inside


@settings(max_examples=60)
@given(outlines)
@example([(0.0, 0.0), (0.0, -1.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)])  # all points repeated
def test_points_stay_inside_or_outside(outline):
    polygon = np.array(outline, np.float64).ravel()
    clipped = clip_polygons([polygon], HEIGHT, WIDTH)
    for part in clipped:
        points = part.reshape(-1, 2)
        assert (points >= -1e-9).all()
        assert (points <= [WIDTH + 1e-9, HEIGHT + 1e-9]).all()
    # At places that no edge of rounded coordinates passes through.
    for x in np.arange(0.00317, WIDTH, 2.71):
        for y in np.arange(0.00713, HEIGHT, 2.31):
            found = any(is_inside(part, x, y) for part in clipped)
            assert found == is_inside(polygon, x, y), (x, y)


def test_what_is_inside_is_unchanged():
    polygon = np.array([1.0, 2.0, 8.5, 2.0, 3.0, 9.0])
    (same,) = clip_polygons([polygon], 9, 8.5)
    np.testing.assert_array_equal(same, polygon)


@pytest.mark.parametrize("shift", [(-40, 0), (40, 0), (0, -40), (0, 40)])
def test_nothing_is_left_of_what_is_outside(shift):
    triangle = np.array([[5.0, 5], [15, 5], [10, 15]]) + shift
    assert clip_polygons([triangle.ravel()], HEIGHT, WIDTH) == []


def test_boxes_do_not_follow_outlines_led_along_a_side():
    """A U whose open end is beyond the left side: nothing of it is near the corners."""
    legs = [-10, 5, 4, 5, 4, 6, -9, 6, -9, 14, 4, 14, 4, 15, -10, 15]
    clipped = clip_polygons([np.array(legs, np.float64)], HEIGHT, WIDTH)
    np.testing.assert_array_equal(polygons_box(clipped), [0, 5, 4, 15])
    # Beyond a corner: the parts beside it are cut by two sides.
    hook = [-10, -10, 6, -10, 6, 3, 5, 3, 5, -9, -9, -9, -9, 12, 3, 12, 3, 13, -10, 13]
    clipped = clip_polygons([np.array(hook, np.float64)], HEIGHT, WIDTH)
    np.testing.assert_array_equal(polygons_box(clipped[:1]), [0, 0, 6, 13])
    beside = [-10, -10, -9, -10, -9, 12, 3, 12, 3, 13, -10, 13]
    clipped = clip_polygons([np.array(beside, np.float64)], HEIGHT, WIDTH)
    np.testing.assert_array_equal(polygons_box(clipped), [0, 12, 3, 13])


def test_boxes_by_hand():
    bitmap = np.zeros((6, 8), bool)
    bitmap[2:5, 3] = True
    np.testing.assert_array_equal(bitmap_box(bitmap), [3, 2, 4, 5])
    np.testing.assert_array_equal(bitmap_box(bitmap[:2]), [0, 0, 0, 0])
    two = [np.array([1.0, 2, 3, 2, 3, 5]), np.array([0.5, 4, 2, 4, 2, 8])]
    np.testing.assert_array_equal(polygons_box(two), [0.5, 2, 3, 8])
    np.testing.assert_array_equal(polygons_box([]), [0, 0, 0, 0])

"""Masks in pictures: whose colour a pixel has, and what it costs."""

from __future__ import annotations

import tracemalloc

import cv2
import numpy as np
import pytest
import torch
from detection_rows import detections_of
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_det.report.colors import BLUE, GREEN, ORANGE, PURPLE, RED, class_color
from cascade_det.report.drawing import draw_detections
from cascade_det.report.mask_drawing import draw_masks, paint_masks

COLORS = (GREEN, ORANGE, BLUE, PURPLE, RED)
GREY = 128


def mixed(color):
    """A colour over grey, by half."""
    return (GREY + np.array(color)) // 2


def is_near(pixels, color):
    return (np.abs(pixels.astype(int) - color) <= 1).all(axis=-1)


def discs(generator, count, height, width):
    """Bool ``[count, height, width]``, discs that may overlap, be cut off or have a hole."""
    rows, columns = np.mgrid[:height, :width]
    masks = []
    for _ in range(count):
        y, x, radius = generator.uniform((0, 0, 2), (height, width, height / 2))
        distance = np.hypot(rows - y, columns - x)
        masks.append((distance < radius) & (distance >= radius * generator.choice([0, 0.5])))
    return np.array(masks).reshape(-1, height, width)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 5))
def test_a_pixel_has_the_colour_of_the_smallest_mask_there(seed, count):
    masks = discs(np.random.default_rng(seed), count, 60, 90)
    image = np.full((60, 90, 3), GREY, np.uint8)
    picture = draw_masks(image, list(masks), COLORS[:count])
    assert (image == GREY).all()
    # An outline may be of any mask, and of two of the same area either may be on top.
    on_outline = np.zeros((60, 90), np.bool_)
    wanted = np.full((60, 90, 3), GREY)
    for index in np.argsort(-masks.sum(axis=(1, 2))):
        wanted[masks[index]] = mixed(COLORS[index])
        padded = np.pad(masks[index].astype(np.uint8), 1)
        on_outline |= masks[index] & (cv2.erode(padded, np.ones((3, 3)))[1:-1, 1:-1] == 0)
    if len(set(masks.sum(axis=(1, 2)))) == count:
        assert is_near(picture, wanted)[~on_outline].all()


def test_outlines_are_opaque_and_above_all_fills():
    large, small = np.zeros((2, 50, 80), np.bool_)
    large[5:45, 5:75] = True
    large[10:15, 60:70] = False  # a hole
    small[20:30, 2:40] = True
    picture = draw_masks(np.full((50, 80, 3), GREY, np.uint8), [small, large], [RED, BLUE])
    assert (picture[5, 5:75] == BLUE).all()
    assert (picture[21:29, 5] == BLUE).all()  # inside the smaller one
    assert (picture[20, 2:40] == RED).all()
    assert (picture[9, 61:69] == BLUE).all()  # above the hole
    assert (picture[11:14, 61:69] == GREY).all()
    assert is_near(picture[22:28, 10:38], mixed(RED)).all()


def ring(size=28):
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    return (np.hypot(rows, columns) < size / 2 - 2).astype(np.float32)


def test_detections_of_a_class_have_masks_of_different_colours():
    rows = [((40, 60, 80, 60), 0.9, 0), ((90, 70, 100, 120), 0.8, 0), ((220, 30, 60, 60), 0.7, 0)]
    found = detections_of(*rows, ((10, 200, 30, 30), 0.4, 0))
    found.masks = torch.from_numpy(np.stack([ring(), ring(), 0 * ring(), ring()]))
    image = np.full((240, 320, 3), GREY, np.uint8)
    picture = draw_detections(image, found, ["cat"])
    assert (image == GREY).all()
    first, second = class_color(0), class_color(1)
    assert is_near(picture[85:95, 60:85], mixed(first)).all()
    assert is_near(picture[140:160, 120:150], mixed(second)).all()
    # The smaller one is on top where both are; each box has the colour of its mask.
    assert is_near(picture[88, 105:110], mixed(first)).all()
    assert (picture[90:119, 40] == first).all()
    assert (picture[150:189, 90] == second).all()
    # A detection without a mask is a box, and one below the threshold is nothing.
    assert (picture[40:85, 225:275] == GREY).all()
    assert (picture[60:89, 220] == class_color(2)).all()
    assert (picture[200:, :60] == GREY).all()


def test_masks_outside_the_picture_and_of_thin_boxes_are_drawn_where_they_can_be():
    found = detections_of(
        *[((500, 60, 80, 60), 0.9, 0), ((-50, -50, 100, 100), 0.9, 0), ((60, 60, 0.5, 90), 0.9, 0)]
    )
    found.masks = torch.ones(3, 28, 28)
    picture = draw_detections(np.full((100, 120, 3), GREY, np.uint8), found, ["cat"])
    assert (picture[10:40, 10:40] != GREY).any(axis=2).all()


def test_one_mask_is_in_memory_at_a_time():
    height, width, count = 600, 800, 60
    found = detections_of(*[((0, 0, width, height), 0.9, 0)] * count)
    found.masks = torch.ones(count, 28, 28)
    image = np.full((height, width, 3), GREY, np.uint8)
    tracemalloc.start()
    draw_detections(image, found, ["cat"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < count * height * width / 2


def test_a_mask_needs_a_colour():
    mask = np.ones((5, 5), np.bool_)
    with pytest.raises(ValueError, match="zip"):
        paint_masks(np.zeros((5, 5, 3), np.uint8), [(0, 0, mask)], [])

"""Tiles in pictures: every pixel has the shade of its tile."""

from __future__ import annotations

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from detection_rows import detections_of

from cascade_det.report.colors import BLUE, ORANGE
from cascade_det.report.drawing import draw_detections
from cascade_det.report.tile_drawing import TILE_KINDS, paint_tiles

GREY = 150


def tiles_of(rows, height, width):
    """``.`` is not computed, ``r`` for regions, ``o`` open."""
    grid = np.array([list(row) for row in rows])
    return SimpleNamespace(opened=grid == "o", computed=grid != ".", height=height, width=width)


# A tile of 19.2 px, as of an image that is enlarged to 800 px from 480; padded beyond the picture.
@pytest.mark.parametrize(("height", "width"), [(32, 32), (19.2, 24.7)])
def test_pixels_have_the_shade_of_their_tile(height, width):
    rows = ["o.r.o", "..roo", "rrr..", "ooooo", "o.o.o"]
    picture = np.full((75, 100, 3), GREY, np.uint8)
    paint_tiles(picture, tiles_of(rows, height, width))
    tint = np.rint([BLUE, ORANGE])
    wanted = {".": [0.35 * GREY] * 3, **dict(zip("ro", 0.8 * GREY + 0.2 * tint, strict=True))}
    lines = {".": (), "r": (BLUE,), "o": (ORANGE,)}
    for y in range(75):
        for x in range(100):
            kind = rows[int(y // height)][int(x // width)]
            pixel = picture[y, x]
            is_line = any((pixel == color).all() for color in lines[kind])
            assert is_line or np.abs(pixel - wanted[kind]).max() < 1.01, (y, x, kind, pixel)


def test_lines_are_around_tiles_of_a_kind_alone():
    picture = np.full((96, 96, 3), GREY, np.uint8)
    paint_tiles(picture, tiles_of(["...", ".oo", "..."], 32, 32))
    is_line = (picture == ORANGE).all(axis=2)
    expected = np.zeros((96, 96), bool)
    expected[32:64, 32:] = True
    expected[33:63, 33:95] = False
    np.testing.assert_array_equal(is_line, expected)


def test_boxes_are_above_tiles_and_the_legend_names_them(monkeypatch):
    texts = []
    put = cv2.putText
    monkeypatch.setattr(
        "cascade_det.report.drawing.cv2.putText", lambda *a: texts.append(a[1]) or put(*a)
    )
    image = np.full((240, 320, 3), GREY, np.uint8)
    found = detections_of(((40, 60, 80, 50), 0.9, 0, 2))
    tiles = tiles_of(["." * 10] * 8, 32, 32)
    plain = draw_detections(image, found, ["cat"])
    assert texts == ["cat 0.90"]
    texts.clear()
    picture = draw_detections(image, found, ["cat"], with_stages=True, tiles=tiles)
    assert texts == ["s2: left after stage 2", *TILE_KINDS, "cat 0.90 s2"]
    edge = np.s_[90:110, 40]
    assert (picture[edge] == plain[edge]).all()
    assert (picture[0, 160] == int(0.35 * GREY)).all()
    assert (image == GREY).all()

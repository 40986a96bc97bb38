"""Pictures with detections: colours, labels and what must stay as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_det.core.structures import Detections
from cascade_det.evaluation import drawing
from cascade_det.evaluation.drawing import draw_detections, stage_color

NAMES = ("cat", "dog")
GREY = 128


@pytest.fixture
def image():
    return np.full((240, 320, 3), GREY, dtype=np.uint8)


def test_edges_have_the_colour_of_the_exit_stage(image, detections):
    rows = [((40, 60, 80, 50), 0.9, 0, 0), ((200, 90, 70, 60), 0.8, 1, 2)]
    picture = draw_detections(image, detections(*rows), NAMES)
    for (x, y, w, h), _, _, stage in rows:
        color = list(stage_color(stage))
        # The lower half of the sides and the middle of the lower edge: labels are above.
        assert (picture[y + h // 2 : y + h, x] == color).all()
        assert (picture[y + h // 2 : y + h, x + w] == color).all()
        assert (picture[y + h, x + 5 : x + w - 5] == color).all()
        assert (picture[y + 5 : y + h - 5, x + 5 : x + w - 5] == GREY).all()


def test_image_is_not_changed(image, detections):
    picture = draw_detections(image, detections(((40, 60, 80, 50), 0.9, 0)), NAMES)
    assert (image == GREY).all()
    assert picture.shape == image.shape
    assert picture.dtype == np.uint8
    assert (picture != GREY).any()


def test_no_detections(image, detections):
    picture = draw_detections(image, detections(), NAMES)
    assert (picture == image).all()
    assert picture is not image


def test_low_scores_are_left_out(image, detections):
    found = detections(((40, 60, 80, 50), 0.49, 0), ((150, 60, 80, 50), 0.3, 1))
    assert (draw_detections(image, found, NAMES) == GREY).all()
    assert (draw_detections(image, found, NAMES, score_threshold=0.4)[110, 45:115] != GREY).any()


def test_threshold_itself_is_drawn(image, detections):
    found = detections(((40, 60, 80, 50), 0.5, 0))
    assert (draw_detections(image, found, NAMES, score_threshold=0.5) != GREY).any()


def test_best_score_is_drawn_on_top(image, detections):
    box = (40, 60, 80, 50)
    for order in ((0, 1), (1, 0)):
        rows = [(box, 0.6, 0, 0), (box, 0.9, 1, 1)]
        picture = draw_detections(image, detections(*(rows[i] for i in order)), NAMES)
        assert (picture[85, 40] == stage_color(1)).all()


def test_legend_shows_the_stages_that_occur(image, detections):
    # The box fills the left half, so the legend stands on the right.
    found = detections(((2, 30, 150, 200), 0.9, 0, 3))
    right = draw_detections(image, found, NAMES)[:, 200:].reshape(-1, 3)
    assert (right == stage_color(3)).all(axis=1).sum() > 500
    assert not (right == stage_color(0)).all(axis=1).any()


def test_labels_of_equal_boxes_do_not_hide_each_other(image, detections, monkeypatch):
    areas = written_areas(monkeypatch)
    box = (60, 80, 150, 80)
    draw_detections(image, detections((box, 0.9, 0), (box, 0.8, 1), (box, 0.7, 0)), NAMES)
    assert len(areas) == 4  # The legend has one line.
    for index, (text, first) in enumerate(areas):
        for other, second in areas[index + 1 :]:
            assert not drawing._shared(first, second), (text, other)


def written_areas(monkeypatch):
    areas = []
    write = drawing._write

    def record(picture, text, area, color, scale):
        areas.append((text, area))
        write(picture, text, area, color, scale)

    monkeypatch.setattr(drawing, "_write", record)
    return areas


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(48, 200),
    width=st.integers(48, 200),
    box=st.tuples(*[st.integers(-50, 250)] * 2, *[st.integers(0, 150)] * 2),
)
def test_labels_stay_inside_the_picture(height, width, box):
    x, y, w, h = box
    found = Detections(
        torch.tensor([[x, y, x + w, y + h]], dtype=torch.float32),
        torch.tensor([0.87]),
        torch.tensor([0]),
        torch.tensor([1]),
    )
    with pytest.MonkeyPatch.context() as patch:
        areas = written_areas(patch)
        picture = draw_detections(
            np.zeros((height, width, 3), np.uint8), found, ["a rather long class name"]
        )
    assert picture.shape == (height, width, 3)
    assert [text for text, _ in areas][-1] == "a rather long class name 0.87 s1"
    for _, (left, top, label_width, label_height) in areas:
        assert 0 <= left < left + label_width <= width
        assert 0 <= top < top + label_height <= height


def test_lines_and_letters_grow_with_the_picture(detections, monkeypatch):
    areas = written_areas(monkeypatch)
    for factor in (1, 5):
        picture = np.full((240 * factor, 320 * factor, 3), GREY, dtype=np.uint8)
        box = tuple(factor * side for side in (40, 60, 80, 50))
        drawn = draw_detections(picture, detections((box, 0.9, 0)), NAMES)
        middle = drawn[85 * factor, : 80 * factor]
        thickness = (middle != GREY).any(axis=1).sum()
        # OpenCV draws a line of thickness 3 up to 5 px wide.
        assert thickness == 1 if factor == 1 else 3 <= thickness <= 5
    small, large = areas[1][1], areas[3][1]
    assert small[3] >= 9  # Pixels, enough to be read.
    assert large[3] > 2 * small[3]


def test_colours_repeat_after_the_last():
    assert stage_color(0) == stage_color(len(drawing.STAGE_COLORS))
    assert len({stage_color(stage) for stage in range(6)}) == 6

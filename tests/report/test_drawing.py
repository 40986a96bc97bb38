"""Pictures with detections: colours, labels and what must stay as it was."""

from __future__ import annotations

import sys

import cv2
import numpy as np
import pytest
import torch
from detection_rows import detections_of
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_det.core.structures import Detections
from cascade_det.onnx_predictor import ArrayDetections
from cascade_det.report import drawing
from cascade_det.report.colors import GREEN, class_color
from cascade_det.report.drawing import caption, draw_boxes, draw_detections, encode

NAMES = ("cat", "dog")
GREY = 128


@pytest.fixture
def image():
    return np.full((240, 320, 3), GREY, dtype=np.uint8)


@pytest.mark.parametrize("with_stages", [False, True])
def test_edges_have_the_colour_of_the_class(image, with_stages):
    rows = [((40, 60, 80, 50), 0.9, 0, 2), ((200, 90, 70, 60), 0.8, 1, 2)]
    picture = draw_detections(image, detections_of(*rows), NAMES, with_stages=with_stages)
    for (x, y, w, h), _, class_index, _ in rows:
        color = list(class_color(class_index))
        # The lower half of the sides and the middle of the lower edge: labels are above.
        assert (picture[y + h // 2 : y + h, x] == color).all()
        assert (picture[y + h // 2 : y + h, x + w] == color).all()
        assert (picture[y + h, x + 5 : x + w - 5] == color).all()
        assert (picture[y + 5 : y + h - 5, x + 5 : x + w - 5] == GREY).all()


def test_image_is_not_changed(image):
    picture = draw_detections(image, detections_of(((40, 60, 80, 50), 0.9, 0)), NAMES)
    assert (image == GREY).all()
    assert picture.shape == image.shape
    assert picture.dtype == np.uint8
    assert (picture != GREY).any()


def test_no_detections(image):
    picture = draw_detections(image, detections_of(), NAMES)
    assert (picture == image).all()
    assert picture is not image


def test_low_scores_are_left_out(image):
    found = detections_of(((40, 60, 80, 50), 0.49, 0), ((150, 60, 80, 50), 0.3, 1))
    assert (draw_detections(image, found, NAMES) == GREY).all()
    assert (draw_detections(image, found, NAMES, score_threshold=0.4)[110, 45:115] != GREY).any()


def test_threshold_itself_is_drawn(image):
    found = detections_of(((40, 60, 80, 50), 0.5, 0))
    assert (draw_detections(image, found, NAMES, score_threshold=0.5) != GREY).any()


def test_best_score_is_drawn_on_top(image):
    box = (40, 60, 80, 50)
    for order in ((0, 1), (1, 0)):
        rows = [(box, 0.6, 0, 0), (box, 0.9, 1, 1)]
        picture = draw_detections(image, detections_of(*(rows[i] for i in order)), NAMES)
        assert (picture[85, 40] == class_color(1)).all()


def test_stages_are_told_only_where_they_are_asked_for(image, monkeypatch):
    areas = written_areas(monkeypatch)
    found = detections_of(((2, 30, 150, 200), 0.9, 0, 3), ((20, 60, 90, 100), 0.8, 1, 0))
    draw_detections(image, found, NAMES)
    assert [text for text, _ in areas] == ["cat 0.90", "dog 0.80"]
    areas.clear()
    draw_detections(image, found, NAMES, with_stages=True)
    legend = ["s0: left after stage 0", "s3: left after stage 3"]
    assert [text for text, _ in areas] == [*legend, "cat 0.90 s3", "dog 0.80 s0"]
    # The boxes fill the left half, so the legend stands on the right.
    assert min(left for _, (left, *_) in areas[:2]) > 150


def test_arrays_are_drawn_as_tensors_are(image):
    tensors = detections_of(((40, 60, 80, 50), 0.9, 0, 2), ((200, 90, 70, 60), 0.8, 1, 0))
    tensors.masks = torch.rand(2, 14, 14)
    arrays = ArrayDetections(*(column.numpy() for column in vars(tensors).values()))
    tensors.scores.requires_grad_()
    for with_stages in (False, True):
        of_tensors, of_arrays = (
            draw_detections(image, found, NAMES, with_stages=with_stages)
            for found in (tensors, arrays)
        )
        assert (of_tensors == of_arrays).all()


def test_labels_of_equal_boxes_do_not_hide_each_other(image, monkeypatch):
    areas = written_areas(monkeypatch)
    box = (60, 80, 150, 80)
    found = detections_of((box, 0.9, 0), (box, 0.8, 1), (box, 0.7, 0))
    draw_detections(image, found, NAMES, with_stages=True)
    assert len(areas) == 4  # The legend has one line.
    taken = np.zeros(image.shape[:2], int)
    for _, (left, top, width, height) in areas:
        taken[top : top + height, left : left + width] += 1
    assert taken.max() == 1


def test_the_work_for_labels_grows_with_their_number_and_no_faster(image):
    def calls(number):
        corners = np.random.default_rng(0).uniform(0, 200, (number, 2))
        boxes = np.concatenate([corners, corners + 40], axis=1)
        count = 0

        def profile(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(profile)
        try:
            draw_boxes(image, boxes, ["cat"] * number, [GREEN] * number)
        finally:
            sys.setprofile(None)
        return count

    assert calls(400) < 4.2 * calls(100)


def written_areas(monkeypatch):
    areas = []
    write = drawing._write

    def record(picture, text, area, color, scale):
        areas.append((text, area))
        write(picture, text, area, color, scale)

    monkeypatch.setattr(drawing, "_write", record)
    return areas


@settings(max_examples=40)
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
        empty = np.zeros((height, width, 3), np.uint8)
        picture = draw_detections(empty, found, ["a rather long class name"], with_stages=True)
    assert picture.shape == (height, width, 3)
    assert [text for text, _ in areas][-1] == "a rather long class name 0.87 s1"
    for _, (left, top, label_width, label_height) in areas:
        assert 0 <= left < left + label_width <= width
        assert 0 <= top < top + label_height <= height


def test_numbers_of_objects_are_written(image, monkeypatch):
    areas = written_areas(monkeypatch)
    boxes = [((40, 60, 80, 50), 0.9, 0), ((10, 20, 30, 40), 0.8, 0), ((0, 0, 9, 9), 0.2, 0)]
    draw_detections(image, detections_of(*boxes), NAMES, track_ids=[None, 3, 4])
    name = NAMES[0]
    assert sorted(text for text, _ in areas) == [f"{name} 0.80 #3", f"{name} 0.90"]


def test_lines_and_letters_grow_with_the_picture(monkeypatch):
    areas = written_areas(monkeypatch)
    for factor in (1, 5):
        picture = np.full((240 * factor, 320 * factor, 3), GREY, dtype=np.uint8)
        box = tuple(factor * side for side in (40, 60, 80, 50))
        drawn = draw_detections(picture, detections_of((box, 0.9, 0)), NAMES)
        middle = drawn[85 * factor, : 80 * factor]
        thickness = (middle != GREY).any(axis=1).sum()
        # OpenCV draws a line of thickness 3 up to 5 px wide.
        assert thickness == 1 if factor == 1 else 3 <= thickness <= 5
    small, large = (area for _, area in areas)
    assert small[3] >= 9  # Pixels, enough to be read.
    assert large[3] > 2 * small[3]


def test_colours_of_classes_can_be_told_apart():
    colors = [class_color(index) for index in range(256)]
    assert len(set(colors)) == 256
    assert class_color(256) == class_color(0)
    # OpenCV's own conversion, in CIE 1976 differences: 2.3 is just noticeable.
    lab = cv2.cvtColor(np.array([colors], np.float32) / 255, cv2.COLOR_BGR2LAB)[0]
    apart = np.linalg.norm(lab[:, None] - lab, axis=2) + 1e9 * np.eye(256)
    assert apart[:20, :20].min() > 30
    assert apart[:80, :80].min() > 20
    assert apart.min() > 10


HOSTILE = [
    "gr\udcf6\udcdfe.png",  # no UTF-8
    "\ud83d",  # half of a pair
    "a\x00b\x1b[31mred\n",
    "\u202etxt.exe",
    "\U0001f600 \u0e01\u0e02",  # no font of OpenCV has these
    "\ue000\uffff\U0010ffff",
    "x" * 10_000,
    "\u732b" * 300,
    "",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:12]))
def test_any_text_is_drawn(image, text, monkeypatch):
    texts = []
    put_text = cv2.putText

    def record(picture, written, *args):
        if picture.ndim == 3:  # else it is looked up what the font has
            texts.append(written)
        return put_text(picture, written, *args)

    monkeypatch.setattr(cv2, "putText", record)
    picture = draw_detections(image, detections_of(((40, 60, 80, 50), 0.9, 0)), [text])
    assert picture.shape == image.shape
    draw_boxes(image, [[40, 60, 120, 110]], [text], [GREEN])
    caption(image, text, GREEN)
    unknown = text_pixels("?")
    for character in set("".join(texts)) - {"?"}:
        assert character.isprintable()
        assert (text_pixels(character) != unknown).any() or character == " "


def text_pixels(text):
    picture = np.zeros((60, 60), np.uint8)
    cv2.putText(picture, text, (10, 40), cv2.FONT_HERSHEY_SIMPLEX, 1.0, 255)
    return picture


@pytest.mark.skipif(int(cv2.__version__[0]) < 5, reason="OpenCV 4 draws ASCII alone")
def test_letters_of_other_languages_stay(image, monkeypatch):
    areas = written_areas(monkeypatch)
    draw_detections(image, detections_of(((40, 60, 80, 50), 0.9, 0)), ["gr\u00f6\u00dfe \u732b"])
    assert areas[0][0] == "gr\u00f6\u00dfe \u732b 0.90"
    assert drawing._drawable("gr\u00f6\u00dfe \u732b") == "gr\u00f6\u00dfe \u732b"


def test_a_picture_becomes_a_file_or_an_error(image, capfd):
    assert (cv2.imdecode(np.frombuffer(encode(image, ".png"), np.uint8), 1) == image).all()
    assert encode(np.zeros((1, 65_500, 3), np.uint8), ".jpg")
    for shape, suffix in (((65_501, 1, 3), ".jpg"), ((0, 5, 3), ".png")):
        with pytest.raises(ValueError, match=rf"{shape[1]} x .* cannot be written as {suffix}"):
            encode(np.zeros(shape, np.uint8), suffix)
    assert capfd.readouterr().err == ""

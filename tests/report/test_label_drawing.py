"""Classes of pixels in pictures: whose colour a pixel has, and what stays as it was."""

import cv2
import numpy as np
import pytest

from cascade_det.report.colors import class_color
from cascade_det.report.label_drawing import draw_labels
from cascade_det.report.segmentation_mistakes import draw_segmentation_mistakes

NAMES = ("background", "cat", "dog")
WHITE = (255, 255, 255)


@pytest.fixture
def image():
    """Large enough for outlines of several pixels."""
    return np.random.default_rng(0).integers(0, 256, (620, 640, 3), np.uint8)


@pytest.fixture
def labels():
    labels = np.zeros((620, 640), np.uint8)
    labels[100:300, 100:300] = 1
    labels[300:500, 100:300] = 2  # touches it
    labels[520:, 500:] = 2
    return labels


def inner(labels, label):
    """Pixels of a class without the outlines."""
    padded = np.pad((labels == label).view(np.uint8), 1)
    return cv2.erode(padded, np.ones((9, 9), np.uint8))[1:-1, 1:-1] > 0


def mixed(image, color):
    return (image.astype(int) + color) // 2


def test_classes_have_their_colours_and_background_is_the_image(image, labels):
    before = image.copy()
    picture = draw_labels(image, labels, NAMES)
    assert (image == before).all()
    assert picture.shape[0] > 620
    assert picture.shape[1:] == (640, 3)
    drawn = picture[:620]
    assert (drawn[labels == 0] == image[labels == 0]).all()
    for label in (1, 2):
        inside = inner(labels, label)
        assert inside.sum() > 1000
        expected = mixed(image[inside], class_color(label))
        assert abs(drawn[inside].astype(int) - expected).max() <= 1
    assert (drawn[labels == 2] == class_color(2)).all(axis=1).sum() > 500  # the outline


def test_the_legend_names_the_classes_that_are_there(image, labels):
    legend = draw_labels(image, labels, NAMES)[620:]
    colors = {tuple(pixel) for pixel in legend.reshape(-1, 3).tolist()}
    assert {class_color(1), class_color(2), WHITE} <= colors
    assert class_color(0) not in colors
    assert class_color(1) not in {
        tuple(pixel)
        for pixel in draw_labels(image, 2 * (labels > 0), NAMES)[620:].reshape(-1, 3).tolist()
    }
    # Nothing but background needs none.
    assert (draw_labels(image, 0 * labels, NAMES) == image).all()


def test_only_a_first_class_of_that_name_is_bare(image, labels):
    names = ("road", "background", "dog")
    drawn = draw_labels(image, labels, names)[:620]
    for label in (0, 1):
        inside = inner(labels, label)
        expected = mixed(image[inside], class_color(label))
        assert abs(drawn[inside].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("ignored", [255, 0])
def test_ignored_pixels_are_white(image, labels, ignored):
    labels[20:90] = ignored
    drawn = draw_labels(image, labels, NAMES, ignored=ignored)[:620]
    inside = inner(labels, ignored)
    assert abs(drawn[inside].astype(int) - mixed(image[inside], WHITE)).max() <= 1


def test_long_legends_have_lines_and_fit(image):
    names = ["background", *(f"a class with a long name, number {i}" for i in range(299))]
    labels = (np.arange(620 * 640) // 1323).astype(np.uint16).reshape(620, 640)
    picture = draw_labels(image, labels, names)
    assert picture.shape[0] > 620 + 50 * 8
    assert draw_labels(image[:, :40], labels[:, :40], names).shape[1] == 40


def test_truth_and_prediction_are_side_by_side():
    image = np.full((240, 300, 3), 100, np.uint8)
    truth, prediction = np.zeros((2, 240, 300), np.uint8)
    truth[:40], truth[120:], prediction[120:] = 255, 1, 2
    picture = draw_segmentation_mistakes(
        image, truth, prediction, NAMES, title="a.png", ignored=255
    )
    assert picture.shape[1] == 2 * 600 + 4  # enlarged twice
    for column, label in ((300, 1), (904, 2)):
        grey, color = (mixed(np.full(3, 100), c) for c in ((100, 100, 100), class_color(label)))
        rows = picture[:, column].astype(int)
        assert (abs(rows - color).max(axis=1) <= 1).sum() > 200
        assert (abs(rows - grey).max(axis=1) <= 1).sum() > 140
    white = (
        abs(picture[:, 300].astype(int) - mixed(np.full(3, 100), WHITE)).max(axis=1) <= 1
    ).sum()
    assert white > 60

"""Detections compared, against answers by hand."""

import pytest
import torch

from cascade_det.benchmark.agreement import compare_detections
from cascade_det.core import Detections


def found(boxes, scores, classes):
    count = len(boxes)
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).view(count, 4),
        torch.tensor(scores),
        torch.tensor(classes),
        torch.zeros(count, dtype=torch.int64),
    )


NONE = found([], [], [])
THERE = found([[0, 0, 100, 100], [50, 50, 90, 90]], [0.9, 0.6], [1, 2])


def test_alike_detections_match():
    moved = found([[50, 50, 90, 91], [0, 0, 100.5, 100]], [0.5, 0.9], [2, 1])
    compared = compare_detections([THERE, NONE], [moved, NONE])
    assert compared == {
        "detections": 2,
        "of_the_other": 2,
        "in_common": 2,
        "box_difference": 1.0,
        "score_difference": pytest.approx(0.1),
    }


def test_another_class_or_place_does_not_match():
    other_class = found([[0, 0, 100, 100]], [0.9], [2])
    other_place = found([[0, 0, 100, 80]], [0.9], [1])
    for other in (other_class, other_place, NONE):
        compared = compare_detections([THERE], [other])
        assert (compared["in_common"], compared["box_difference"]) == (0, 0.0)


def test_two_cannot_match_the_same_one():
    twice = found([[0, 0, 100, 100], [0, 0, 100, 99]], [0.9, 0.8], [1, 1])
    assert compare_detections([twice], [THERE])["in_common"] == 1
    assert compare_detections([THERE], [twice])["in_common"] == 1

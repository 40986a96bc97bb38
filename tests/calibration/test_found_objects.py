"""The objects that are found, and those that early exits lose, by hand."""

import numpy as np
import pytest

from cascade_det.calibration.found_objects import found_objects, lost_shares

GT_BOXES = [[0, 0, 100, 100], [200, 0, 300, 100], [0, 200, 100, 300]]
GT_CLASSES = [0, 0, 1]


def loss(full, early):
    """At IoU 0.5."""
    return losses(full, early)[0]


def losses(full, early):
    found = [found_objects(one, GT_BOXES, GT_CLASSES, score=0.3) for one in (full, early)]
    return lost_shares(*found).tolist()


FIRST, SECOND, THIRD = (0, 0, 100, 100), (200, 0, 100, 100), (0, 200, 100, 100)


def test_share_of_found_objects_that_is_lost(detections):
    full = detections((FIRST, 0.9, 0), (SECOND, 0.8, 0), (THIRD, 0.7, 1))
    assert loss(full, full) == 0
    assert loss(full, full[:2]) == pytest.approx(1 / 3)
    assert loss(full, detections()) == 1
    # Two of three found: what the full cascade misses is no loss, and no gain either.
    assert loss(full[:2], full[1:]) == 0.5
    assert loss(detections(), full) == 0


@pytest.mark.parametrize(
    ("early", "expected"),
    [
        ((FIRST, 0.3, 0), 0),
        ((FIRST, 0.29, 0), 1),  # below the score
        ((FIRST, 0.9, 1), 1),  # another class
        (((0, 0, 100, 50), 0.9, 0), 0),  # IoU 0.5
        (((0, 0, 100, 49), 0.9, 0), 1),
    ],
)
def test_what_counts_as_found_again(detections, early, expected):
    assert loss(detections((FIRST, 0.9, 0)), detections(early)) == expected


def test_stricter_overlap(detections):
    full = detections((FIRST, 0.9, 0))
    early = detections(((0, 0, 100, 70), 0.9, 0))
    assert losses(full, early) == [0, 1]
    # A full cascade that is no better has nothing to lose.
    assert losses(early, detections()) == [1, 0]


def test_one_object_for_each_detection(detections):
    gt = {"gt_boxes": [[0, 0, 100, 100], [0, 0, 100, 80]], "gt_classes": [0, 0], "score": 0.0}
    both = detections(((0, 0, 100, 90), 0.5, 0), ((0, 0, 100, 100), 0.9, 0))
    assert found_objects(both, **gt)[0].tolist() == [True, True]
    # The better one takes the nearest object first, whatever the order of the rows.
    assert found_objects(both[1:], **gt)[0].tolist() == [True, False]
    assert found_objects(both[:1], **gt)[0].tolist() == [True, False]
    three = detections(*[((0, 0, 100, 90), 0.5, 0)] * 3)
    assert found_objects(three, **gt)[0].tolist() == [True, True]


def test_images_without_objects(detections):
    some = detections((FIRST, 0.9, 0))
    assert found_objects(some, [], [], score=0.3).shape == (2, 0)
    assert lost_shares(np.zeros((2, 3), bool), np.ones((2, 3), bool)).tolist() == [0, 0]

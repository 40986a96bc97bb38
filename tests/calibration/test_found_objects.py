"""What early exits lose of an image, by hand and against a plain loop."""

import numpy as np
import pytest
import torch

from cascade_det.calibration.found_objects import found_objects, lost_share
from cascade_det.core.structures import Detections

GT_BOXES = [[0, 0, 100, 100], [200, 0, 300, 100], [0, 200, 100, 300]]
GT_CLASSES = [0, 0, 1]


def loss(full, early, **options):
    found = [
        found_objects(one, GT_BOXES, GT_CLASSES, score=0.3, **options) for one in (full, early)
    ]
    return lost_share(*found)


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
    assert loss(full, early) == 0
    assert loss(full, early, iou=0.75) == 1
    # A full cascade that is no better has nothing to lose.
    assert loss(early, detections(), iou=0.75) == 0


def test_one_object_for_each_detection(detections):
    gt = {"gt_boxes": [[0, 0, 100, 100], [0, 0, 100, 80]], "gt_classes": [0, 0], "score": 0.0}
    both = detections(((0, 0, 100, 90), 0.5, 0), ((0, 0, 100, 100), 0.9, 0))
    assert found_objects(both, **gt).tolist() == [True, True]
    # The better one takes the nearest object first, whatever the order of the rows.
    assert found_objects(both[1:], **gt).tolist() == [True, False]
    assert found_objects(both[:1], **gt).tolist() == [True, False]
    three = detections(*[((0, 0, 100, 90), 0.5, 0)] * 3)
    assert found_objects(three, **gt).tolist() == [True, True]


def test_images_without_objects(detections):
    some = detections((FIRST, 0.9, 0))
    assert found_objects(some, [], [], score=0.3).shape == (0,)
    assert lost_share(np.zeros(3, bool), np.ones(3, bool)) == 0


def plain_found(detections, gt_boxes, gt_classes, score, iou):
    rows = zip(
        detections.scores.tolist(),
        detections.boxes.tolist(),
        detections.classes.tolist(),
        strict=True,
    )
    found = [False] * len(gt_boxes)
    for value, box, index in sorted(rows, key=lambda row: -row[0]):
        best, best_overlap = None, iou
        for place, (gt_box, gt_class) in enumerate(zip(gt_boxes, gt_classes, strict=True)):
            width = max(min(box[2], gt_box[2]) - max(box[0], gt_box[0]), 0)
            height = max(min(box[3], gt_box[3]) - max(box[1], gt_box[1]), 0)
            areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, gt_box)]
            overlap = width * height / (sum(areas) - width * height)
            if index == gt_class and not found[place] and overlap >= best_overlap:
                best, best_overlap = place, overlap
        if value >= score and best is not None:
            found[best] = True
    return found


@pytest.mark.parametrize("iou", [0.5, 0.75])
def test_found_objects_against_a_loop(iou):
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(60):
        gt_boxes = np.concatenate([corner := rng.uniform(0, 60, (6, 2)), corner + 50], axis=1)
        gt_classes = rng.integers(0, 2, 6)
        boxes = np.tile(gt_boxes, (3, 1)) + rng.normal(0, 5, (18, 4))
        found = Detections(
            torch.from_numpy(boxes),
            torch.from_numpy(rng.random(18)),
            torch.from_numpy(np.tile(gt_classes, 3)),
            torch.zeros(18, dtype=torch.int64),
        )
        expected = plain_found(found, gt_boxes.tolist(), gt_classes.tolist(), 0.4, iou)
        actual = found_objects(found, gt_boxes, gt_classes, score=0.4, iou=iou)
        assert actual.tolist() == expected
        shares.append(actual.mean())
    assert 0.3 < np.mean(shares) < 0.95

"""Selection and rescaling of detections against loops over boxes."""

import math

import pytest
import torch
from naive_cascade import iou
from small_cascades import random_boxes, reported

from cascade_det.core import Detections
from cascade_det.core.postprocess import (
    Selection,
    rescale_boxes,
    rescale_detections,
    select_detections,
)

NUM_CLASSES = 3
SIZE = (60, 80)


def make_candidates(*, rows=40, images=2, per_class=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = NUM_CLASSES if per_class else 1
    boxes = random_boxes(rows * width, SIZE, generator=generator).view(rows, 4 * width)
    probs = torch.softmax(2 * torch.randn(rows, NUM_CLASSES + 1, generator=generator), dim=1)
    image_index = torch.randint(images, (rows,), generator=generator)
    exit_stages = torch.randint(3, (rows,), generator=generator)
    return boxes, probs, image_index, exit_stages


def select(candidates, *, images=2, score_thresh=0.05, nms_thresh=0.4, detections_per_image=100):
    selection = Selection(score_thresh, nms_thresh, detections_per_image)
    return select_detections([reported(*candidates)], images, selection)


def brute_force(candidates, image, *, score_thresh=0.05, nms_thresh=0.4, detections_per_image=100):
    """(score, class, exit stage, box) of one image's detections."""
    found = []
    for box, row_probs, row_image, exit_stage in zip(
        *(c.tolist() for c in candidates), strict=True
    ):
        for label in range(NUM_CLASSES):
            own = box if len(box) == 4 else box[4 * label : 4 * label + 4]
            if row_image == image and row_probs[label] > score_thresh:
                found.append((row_probs[label], label, exit_stage, own))
    kept = []
    for candidate in sorted(found, reverse=True):
        if not any(k[1] == candidate[1] and iou(k[3], candidate[3]) > nms_thresh for k in kept):
            kept.append(candidate)
    return kept[:detections_per_image]


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("score_thresh", [0.0, 0.3])
@pytest.mark.parametrize("nms_thresh", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("detections_per_image", [100, 7])
def test_selection_equals_brute_force(per_class, score_thresh, nms_thresh, detections_per_image):
    candidates = make_candidates(per_class=per_class)
    thresholds = {
        "score_thresh": score_thresh,
        "nms_thresh": nms_thresh,
        "detections_per_image": detections_per_image,
    }
    for image, got in enumerate(select(candidates, **thresholds)):
        wanted = brute_force(candidates, image, **thresholds)
        assert len(wanted) > 1
        scores, classes, exit_stages, boxes = zip(*wanted, strict=True)
        assert got.classes.tolist() == list(classes)
        assert got.exit_stages.tolist() == list(exit_stages)
        torch.testing.assert_close(got.scores, torch.tensor(scores))
        torch.testing.assert_close(got.boxes, torch.tensor(boxes))


def test_a_score_has_to_exceed_the_threshold():
    boxes = torch.tensor([[0.0, 0, 10, 10], [30, 30, 50, 50]])
    probs = torch.tensor([[0.25, 0.0, 0.0, 0.75], [0.26, 0.0, 0.0, 0.74]])
    none = torch.zeros(2, dtype=torch.int64)
    [got] = select((boxes, probs, none, none), images=1, score_thresh=0.25)
    assert got.boxes.tolist() == [[30, 30, 50, 50]]


def test_a_negative_limit_keeps_all():
    candidates = make_candidates()
    kept = select(candidates, detections_per_image=-1)
    limited = select(candidates, detections_per_image=0)
    assert [len(d) for d in kept] == [len(brute_force(candidates, image)) for image in (0, 1)]
    assert [len(d) for d in limited] == [0, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("field", [0, 1])
def test_rows_that_are_not_finite_are_left_out(bad, field):
    candidates = make_candidates()
    without = [c[1:] for c in candidates]
    candidates[field][0, 2] = bad
    for got, wanted in zip(select(candidates), select(without), strict=True):
        assert torch.equal(got.boxes, wanted.boxes)
        assert torch.equal(got.scores, wanted.scores)


def test_far_away_images_do_not_blur_overlaps():
    # Two boxes that overlap by a hair more than allowed, in the last of many images.
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5.001]]).repeat(500, 1)
    probs = torch.tensor([[0.9, 0.0, 0.0, 0.1], [0.8, 0.0, 0.0, 0.2]]).repeat(500, 1)
    images = torch.arange(500).repeat_interleave(2)
    detections = select(
        (boxes, probs, images, torch.zeros_like(images)), images=500, nms_thresh=0.5
    )
    assert [len(d) for d in detections] == [1] * 500


def some_detections(boxes):
    count = len(boxes)
    return Detections(
        torch.tensor(boxes),
        torch.linspace(0.9, 0.1, count),
        torch.arange(count),
        torch.arange(count) % 3,
    )


def test_rescaling_by_hand():
    detections = some_detections(
        [[10.0, 20.0, 30.0, 40.0], [90.0, 10.0, 120.0, 60.0], [100.0, 10.0, 130.0, 20.0]]
    )
    # From 50 x 100 (height x width) to 100 x 50: x halves, y doubles; clipped; one is gone.
    frames = [((50, 100), (100, 50)), ((50, 100), (50, 100))]
    got, same = rescale_detections([detections, detections[:1]], frames)
    assert got.boxes.tolist() == [[5, 40, 15, 80], [45, 20, 50, 100]]
    assert got.classes.tolist() == [0, 1]
    assert got.exit_stages.tolist() == [0, 1]
    assert torch.equal(got.scores, detections.scores[:2])
    assert torch.equal(same.boxes, detections.boxes[:1])
    assert rescale_boxes(detections.boxes, (50, 100), (100, 50)).shape == (3, 4)


def test_rescaling_equals_a_loop():
    boxes = random_boxes(20, SIZE, generator=torch.Generator().manual_seed(0))
    wanted = [
        [min(max(v * (97 / 80 if i % 2 == 0 else 31 / 60), 0), (97, 31)[i % 2]) for i, v in box]
        for box in (list(enumerate(b)) for b in boxes.tolist())
    ]
    torch.testing.assert_close(rescale_boxes(boxes, SIZE, (31, 97)), torch.tensor(wanted))


def test_rescaling_nothing():
    none = some_detections([[1.0, 1.0, 2.0, 2.0]])[:0]
    (got,) = rescale_detections([none], [((50, 100), (10, 10))])
    assert len(got) == 0
    assert rescale_detections([], []) == []

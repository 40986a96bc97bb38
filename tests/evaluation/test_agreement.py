"""What exits lose of the full cascade's detections, against a matching in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_exits import iou

from cascade_det.core.structures import Detections
from cascade_det.evaluation import Agreement, agreement_loss, find_again

BOX, OTHER = (10, 10, 100, 100), (200, 50, 60, 80)


def test_what_is_the_same_is_no_loss(detections):
    found = detections((BOX, 0.9, 0), (OTHER, 0.6, 1), (BOX, 0.55, 1))
    assert agreement_loss(found, found) == 0
    assert agreement_loss(found[:0], found[:0]) == 0


def test_the_overlap_has_to_reach_a_half(detections):
    full = detections(((0, 0, 100, 100), 0.9, 0))
    # 50 of 100 columns: IoU 0.5; 49: below.
    assert agreement_loss(detections(((0, 0, 50, 100), 0.9, 0)), full) == 0
    assert agreement_loss(detections(((0, 0, 49, 100), 0.9, 0)), full) == 1


def test_scores_below_the_cut_count_on_neither_side(detections):
    full = detections((BOX, 0.9, 0), (OTHER, 0.49, 1))
    assert agreement_loss(detections((BOX, 0.51, 0)), full) == 0
    assert agreement_loss(detections((BOX, 0.49, 0)), full) == 1
    assert agreement_loss(detections((BOX, 0.49, 0)), full, min_score=0.4) == 0.5
    assert agreement_loss(detections(), detections((BOX, 0.49, 0))) == 0


def test_rounding_of_a_score_at_the_cut_is_no_loss(detections):
    full = detections((BOX, 0.5, 0))
    assert agreement_loss(detections((BOX, 0.49999, 0)), full) == 0
    assert agreement_loss(detections((BOX, 0.4998, 0)), full) == 1


def test_an_empty_box_overlaps_nothing_not_even_itself(detections):
    flat = detections(((10, 10, 0, 50), 0.9, 0), (BOX, 0.8, 0))
    assert agreement_loss(flat, flat) == 0.5


def test_inputs_stay_and_need_no_order(detections):
    early = detections((OTHER, 0.6, 1), (BOX, 0.9, 0))
    before = early.boxes.clone()
    assert agreement_loss(early, detections((OTHER, 0.6, 1), (BOX, 0.9, 0))) == 0
    torch.testing.assert_close(early.boxes, before)


def plain_loss(early, full, cut):
    """Lists of (score, class, box): a loop over pairs."""

    free = [d for d in early if d[0] >= cut]
    wanted = sorted((d for d in full if d[0] >= cut), key=lambda d: -d[0])
    lost = 0
    for _, label, box in wanted:
        rivals = [(iou(box, d[2]), d) for d in free if d[1] == label]
        rivals = [rival for rival in rivals if rival[0] >= 0.5]
        if rivals:
            free.remove(max(rivals, key=lambda rival: rival[0])[1])
        else:
            lost += 1
    return lost / len(wanted) if wanted else 0.0


def as_detections(rows):
    return Detections(
        torch.tensor([box for _, _, box in rows], dtype=torch.float32).reshape(-1, 4),
        torch.tensor([score for score, _, _ in rows], dtype=torch.float32),
        torch.tensor([label for _, label, _ in rows], dtype=torch.int64),
        torch.zeros(len(rows), dtype=torch.int64),
    )


@st.composite
def crowded(draw):
    """Detections of few classes in a small field, no two of one score; scores off the cut."""
    rows = []
    for score in draw(st.lists(st.integers(0, 99), max_size=9, unique=True)):
        x, y = draw(st.integers(0, 12)), draw(st.integers(0, 12))
        box = (x, y, x + draw(st.integers(5, 20)), y + draw(st.integers(5, 20)))
        rows.append((score / 100 + 0.003, draw(st.integers(0, 1)), box))
    return rows


@settings(max_examples=80)
@given(early=crowded(), full=crowded(), cut=st.sampled_from([0.1, 0.5]))
def test_equals_a_loop_over_all_pairs(early, full, cut):
    ours = agreement_loss(as_detections(early), as_detections(full), min_score=cut)
    assert ours == plain_loss(early, full, cut)


class TestFindAgain:
    def test_the_shift_is_that_of_the_coordinates(self, detections):
        wanted = [detections((BOX, 0.9, 0), (OTHER, 0.6, 1)), detections((BOX, 0.7, 1))]
        # 2 pixels to the right; 1 pixel wider; the same.
        found = [
            detections(((12, 10, 100, 100), 0.9, 0), ((200, 50, 61, 80), 0.6, 1)),
            detections((BOX, 0.8, 1)),
        ]
        agreement = find_again(found, wanted)
        assert (agreement.wanted, agreement.found, agreement.share) == (3, 3, 1)
        # XYXY: (2, 0, 2, 0), (0, 0, 1, 0) and zeros.
        assert agreement.shift == pytest.approx((1.0 + 0.25 + 0.0) / 3)

    def test_class_overlap_and_score_decide(self, detections):
        wanted = [detections((BOX, 0.9, 0), (BOX, 0.8, 1), (OTHER, 0.5, 1), (OTHER, 0.49, 0))]
        # Of 100 columns, 90 are shared, then 89; the other's score stays, then falls.
        for found, count in (
            (detections(((10, 10, 90, 100), 0.9, 0), (OTHER, 0.5, 1)), 2),
            (detections(((10, 10, 89, 100), 0.9, 0), (OTHER, 0.49, 1)), 0),
            (detections((BOX, 0.9, 2), (OTHER, 0.9, 0)), 0),
        ):
            agreement = find_again([found], wanted)
            assert (agreement.wanted, agreement.found) == (3, count)
            assert agreement.share == count / 3
        assert find_again([found], wanted, min_score=0.85).wanted == 1

    def test_one_detection_is_found_once(self, detections):
        twice = detections((BOX, 0.9, 0), (BOX, 0.8, 0))
        assert find_again([detections((BOX, 0.9, 0))], [twice]) == Agreement(2, 1, 0.0)

    def test_nothing_to_find(self, detections):
        assert find_again([detections((BOX, 0.9, 0))], [detections()]).share == 1
        assert find_again([], []) == Agreement(0, 0, 0.0)

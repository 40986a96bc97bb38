"""Metrics of weighted images, against Detectron2's formulas and copies of images."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_det.calibration.maps.scores import Scorer, resamples
from cascade_det.evaluation.semantic import semantic_metrics

NAMES = ["background", "a", "b"]


def matrices(seed, images=6):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 50, (images, 3, 3)) * (rng.random((images, 3, 1)) < 0.8)


@settings(max_examples=30)
@given(seed=st.integers(0, 999))
def test_iou_of_images_and_of_their_copies(seed):
    counts, scorer = matrices(seed), Scorer(range(6), "mIoU")
    assert scorer.score(counts) == pytest.approx(semantic_metrics(counts.sum(0), NAMES)["mIoU"])
    weights = resamples(6, rounds=3)
    found = scorer._scores(counts, weights)
    for value, copies in zip(found, weights.astype(int), strict=True):
        repeated = np.repeat(counts, copies, axis=0).sum(0)
        expected = semantic_metrics(repeated, NAMES)["mIoU"]
        assert value == pytest.approx(expected, nan_ok=True)


def test_dice_by_hand():
    """Two volumes of two slices; the second has no b, which then does not count."""
    counts = np.zeros((4, 3, 3), int)
    counts[0, 1, 1], counts[1, 1, 0], counts[1, 0, 1] = 30, 10, 20  # a: 2 * 30 / (40 + 50)
    counts[0, 2, 2] = 5  # b: 1
    counts[2, 1, 1], counts[3, 1, 2] = 10, 30  # a: 2 * 10 / (40 + 10)
    found = Scorer([0, 0, 1, 1], "Dice").score(counts)
    assert found == pytest.approx(100 * (60 / 90 + 1 + 20 / 50) / 3)


def test_differences_use_the_same_resamples():
    counts, scorer = matrices(0), Scorer(range(6), "mIoU")
    same = scorer.difference(counts, counts)
    assert (same.value, same.deviation, same.low, same.high) == (0, 0, 0, 0)
    other = scorer.difference(counts, matrices(1))
    assert other.low < other.value < other.high


def test_a_ratio_of_sums():
    scorer = Scorer(range(3), "mIoU")
    found = scorer.ratio(np.array([1.0, 3.0, 2.0]), np.array([2.0, 6.0, 4.0]))
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    # The slices of a volume are drawn together, so that their differences add up to nothing.
    scorer = Scorer([0, 0, 1, 1], "mIoU")
    found = scorer.ratio(np.array([1.0, 3.0, 3.0, 1.0]), np.full(4, 4.0))
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert scorer.of_groups(np.array([1.0, 3.0, 3.0, 0.0])).tolist() == [2, 1.5]


def test_unknown_metrics():
    with pytest.raises(ValueError, match="known: mIoU, Dice"):
        Scorer([0], "AP")

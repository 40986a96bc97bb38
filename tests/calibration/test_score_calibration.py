"""Score calibration: known maps are found again, and the error is that of a plain loop."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from cascade_det.calibration.score_calibration import (
    expected_calibration_error,
    fit_score_maps,
)

SCALES, SHIFTS = (0.6, 1.5, 1.0), (-1.2, 0.3, 0.0)


def mapped(calibration, scores, stages):
    """Calibrated scores, by the definition in the docstring of the module."""
    logits = logit(np.asarray(scores))
    scales, shifts = np.array(calibration).T
    return expit(scales[stages] * logits + shifts[stages])


def samples(count=30_000, seed=0, scales=SCALES, shifts=SHIFTS):
    """Scores, and outcomes whose probability is the known map of the score."""
    rng = np.random.default_rng(seed)
    stages = rng.integers(0, len(scales), count)
    scores = rng.uniform(0.01, 0.99, count)
    truth = expit(np.array(scales)[stages] * logit(scores) + np.array(shifts)[stages])
    return scores, rng.random(count) < truth, stages


def standard_errors(scores, probabilities):
    """Of scale and shift: the inverse of the Fisher information at the known map."""
    design = np.stack([logit(scores), np.ones_like(scores)])
    information = (design * probabilities * (1 - probabilities)) @ design.T
    return np.sqrt(np.diag(np.linalg.inv(information)))


def test_known_scales_and_shifts_are_found():
    scores, correct, stages = samples()
    found = fit_score_maps(scores, correct, stages, 3)
    for stage in range(3):
        here = scores[stages == stage]
        truth = expit(SCALES[stage] * logit(here) + SHIFTS[stage])
        scale_error, shift_error = standard_errors(here, truth)
        assert scale_error < 0.05
        assert found[stage].scale == pytest.approx(SCALES[stage], abs=3 * scale_error)
        assert found[stage].shift == pytest.approx(SHIFTS[stage], abs=3 * shift_error)


def test_fit_is_the_maximum():
    scores, correct, stages = samples(count=600)

    def likelihood(scale, shift, stage):
        p = expit(scale * logit(scores) + shift)
        return np.where(correct, np.log(p), np.log(1 - p))[stages == stage].sum()

    found = fit_score_maps(scores, correct, stages, 3)
    for stage, (scale, shift) in enumerate(found):
        best = likelihood(scale, shift, stage)
        for scale_step, shift_step in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
            assert likelihood(scale + scale_step, shift + shift_step, stage) < best


def test_error_falls_on_other_samples():
    calibration = fit_score_maps(*samples(), 3)
    scores, correct, stages = samples(seed=1)
    before = expected_calibration_error(scores, correct)
    after = expected_calibration_error(mapped(calibration, scores, stages), correct)
    assert after < 0.015 < 0.03 < before


def test_order_within_a_stage_stays():
    # Scores that say the opposite of the outcome: they must not be turned around.
    scores = np.linspace(0.05, 0.95, 200)
    calibration = fit_score_maps(scores, scores < 0.5, np.zeros(200, int), 1)
    assert 0 < calibration[0].scale < 0.1
    assert (np.diff(mapped(calibration, scores, np.zeros(200, int))) > 0).all()
    # Scores that tell all: no maximum exists, and what comes out is finite and rises.
    calibration = fit_score_maps(scores, scores > 0.5, np.zeros(200, int), 1)
    assert calibration[0].scale <= 100
    assert (np.diff(mapped(calibration, scores, np.zeros(200, int))) >= 0).all()


def test_stages_without_enough_to_learn_from_keep_their_scores():
    rng = np.random.default_rng(0)
    stages = np.repeat([0, 1, 2, 3], [49, 500, 500, 50])
    correct = rng.random(len(stages)) < 0.3
    correct[stages == 1], correct[stages == 2] = True, False
    scores = rng.uniform(0, 1, len(stages))
    found = fit_score_maps(scores, correct, stages, 5)
    kept = [0, 1, 2, 4]
    assert [found[stage].scale for stage in kept] == [1] * 4
    assert [found[stage].shift for stage in kept] == [0] * 4
    assert found[3].scale != 1
    rows = stages < 3
    np.testing.assert_allclose(mapped(found, scores, stages)[rows], scores[rows], rtol=1e-12)


def test_scores_of_0_and_1():
    scores = np.concatenate([np.zeros(100), np.ones(100)])
    correct = np.arange(200) % 4 > 0
    found = fit_score_maps(scores, correct, np.zeros(200, int), 1)
    assert np.isfinite(found).all()


def plain_error(scores, correct, bins):
    """The same by a loop over the bins."""
    total = 0.0
    for index in range(bins):
        last = index == bins - 1
        rows = [
            (score, hit)
            for score, hit in zip(scores, correct, strict=True)
            if int(score * bins) == index or (last and score == 1)
        ]
        if rows:
            confidence = sum(score for score, _ in rows) / len(rows)
            accuracy = sum(hit for _, hit in rows) / len(rows)
            total += len(rows) / len(scores) * abs(accuracy - confidence)
    return total


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1), st.integers(1, 20))
def test_calibration_error_against_a_loop(rows, bins):
    scores, correct = zip(*rows, strict=True)
    expected = plain_error(scores, correct, bins)
    assert expected_calibration_error(scores, correct, bins) == pytest.approx(expected, abs=1e-9)


def test_calibration_error_by_hand():
    # Bins of 0.5: 0.2 and 0.4 with one hit (0.5 against 0.3), and 0.9 without one.
    error = expected_calibration_error([0.2, 0.4, 0.9], [True, False, False], bins=2)
    assert error == pytest.approx((2 * 0.2 + 0.9) / 3)
    assert math.isnan(expected_calibration_error([], []))

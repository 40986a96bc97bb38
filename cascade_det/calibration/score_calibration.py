"""Calibrated scores, which mean the same after every exit stage.

A detection's score ``p`` becomes ``sigmoid(a_s * logit(p) + b_s)``, where *s* is the last stage
that its region saw: Platt scaling (1999) on the logit, and with ``b_s = 0`` the temperature
``1 / a_s`` of Guo et al. (arXiv 1706.04599). N detections, S stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import expit, logit

MIN_SAMPLES = 50
# Finite where scores separate hits from misses perfectly; positive, so that the order of scores
# stays. Below 1e-6, rounding dominates a score.
SCALE_RANGE = (0.01, 100.0)
SHIFT_RANGE = (-50.0, 50.0)
SMALLEST_SCORE = 1e-6


class ScoreMap(NamedTuple):
    """The monotonic map of the scores of one exit stage.

    Attributes:
        scale: ``a``, above 0.
        shift: ``b``.
    """

    scale: float
    shift: float


UNCHANGED = ScoreMap(1.0, 0.0)


def fit_score_maps(
    scores: npt.ArrayLike, correct: npt.ArrayLike, exit_stages: npt.ArrayLike, num_stages: int
) -> list[ScoreMap]:
    """Fit the map of each stage by maximum likelihood.

    Stages with fewer than ``MIN_SAMPLES`` detections, or with one outcome only, keep their scores.

    Args:
        scores: ``[N]`` in [0, 1].
        correct: ``[N]``, whether the detection is a true positive (at IoU 0.5, say), without
            detections that COCO ignores.
        exit_stages: ``[N]``, whole numbers in ``[0, S)``.
        num_stages: S.
    """
    logits = logit(np.clip(np.asarray(scores, np.float64), SMALLEST_SCORE, 1 - SMALLEST_SCORE))
    outcomes, stages = np.asarray(correct, bool), np.asarray(exit_stages, np.int64)
    fitted = []
    for stage in range(num_stages):
        rows = stages == stage
        hits = int(outcomes[rows].sum())
        enough = rows.sum() >= MIN_SAMPLES and 0 < hits < rows.sum()
        fitted.append(_fit(logits[rows], outcomes[rows]) if enough else UNCHANGED)
    return fitted


def expected_calibration_error(
    scores: npt.ArrayLike, correct: npt.ArrayLike, bins: int = 15
) -> float:
    """How far scores are from the share of true positives in their bin (1706.04599, eq. 3).

    Args:
        scores: ``[N]`` in [0, 1].
        correct: ``[N]``, whether the detection is a true positive.
        bins: number of bins of equal width, weighted by their detections.

    Returns:
        In [0, 1]; nan without detections.
    """
    values, outcomes = np.asarray(scores, np.float64), np.asarray(correct, np.float64)
    if len(values) == 0:
        return float("nan")
    index = np.minimum((values * bins).astype(np.int64), bins - 1)
    return float(np.abs(np.bincount(index, outcomes - values)).sum() / len(values))


def _fit(logits: npt.NDArray[np.float64], outcomes: npt.NDArray[np.bool_]) -> ScoreMap:
    """The map of the least mean cross entropy, a convex problem."""
    signs = np.where(outcomes, 1.0, -1.0)

    def loss(parameters: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        scale, shift = parameters
        margins = signs * (scale * logits + shift)
        slopes = -signs * expit(-margins)
        gradient = np.array([(slopes * logits).mean(), slopes.mean()])
        return float(np.logaddexp(0, -margins).mean()), gradient

    found = minimize(
        loss,
        np.array(UNCHANGED),
        jac=True,
        bounds=[SCALE_RANGE, SHIFT_RANGE],
        options={"ftol": 1e-14, "gtol": 1e-9},
    )
    return ScoreMap(*found.x.tolist())


def to_last_stage(fitted: Sequence[ScoreMap]) -> list[ScoreMap]:
    """The maps to scores of the last stage that follow from maps to probabilities.

    Stages with too few detections to be fitted keep their scores.
    """
    last = fitted[-1]
    return [
        one
        if one == UNCHANGED
        else ScoreMap(one.scale / last.scale, (one.shift - last.shift) / last.scale)
        for one in fitted
    ]

"""A confidence interval that holds at any number of samples: of shares, and of means in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq

Interval = tuple[float, float]

_NEXT_TO_0 = 1e-12
# The largest part of the capital that one sample may cost.
_MOST_AT_STAKE = 0.75


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """An interval of the mean of a distribution on [0, 1], from samples in the order they came.

    By betting (Waudby-Smith and Ramdas, arXiv 2010.09686, the hedged capital process with
    predictable bets): against each candidate for the mean somebody bets on every next sample, and
    a candidate against which they have become rich is out. It holds for any distribution on
    [0, 1] and any number of samples, and whoever looks after every sample is as safe as who looks
    once: with at least ``confidence`` *all* of the intervals of ``values[:1], values[:2], ...``
    have the mean. It depends on the order of the samples, which must not depend on their values.
    The mean of zeros and ones is the share of the ones.

    Args:
        values: independent samples in [0, 1]; none of them give [0, 1].
        confidence: see above.

    Raises:
        ValueError: a value is not in [0, 1].
    """
    samples = np.asarray(values, dtype=np.float64)
    if not ((samples >= 0) & (samples <= 1)).all():
        raise ValueError(f"values from 0 to 1 are needed, not {samples.min()} to {samples.max()}")
    limit = math.log(2 / (1 - confidence))
    low, high = _lower_bound(samples, limit), 1.0 - _lower_bound(1.0 - samples, limit)
    # Of samples that are no sample of one distribution, the mean may lie outside.
    mean = float(samples.mean()) if len(samples) else low
    return min(low, mean), max(high, mean)


def _lower_bound(samples: npt.NDArray[np.float64], limit: float) -> float:
    """The largest mean that is refuted as too low: a bet on more has won ``exp(limit)``."""
    stakes = _stakes(samples, limit)

    def excess(mean: float) -> float:
        # Each factor falls as the mean rises, so there is one root at most.
        factors = np.minimum(stakes, _MOST_AT_STAKE / mean) * (samples - mean)
        return float(np.log1p(factors).sum()) - limit

    if excess(_NEXT_TO_0) < 0:
        return 0.0
    return float(brentq(excess, _NEXT_TO_0, 1.0, xtol=1e-10))


def _stakes(samples: npt.NDArray[np.float64], limit: float) -> npt.NDArray[np.float64]:
    """What to bet on each sample, from those before it alone."""
    numbers = np.arange(1, len(samples) + 1)
    means = (0.5 + samples.cumsum()) / (numbers + 1)
    variances = (0.25 + ((samples - means) ** 2).cumsum()) / (numbers + 1)
    before = np.concatenate([[0.25], variances])[: len(samples)]
    return np.sqrt(2 * limit / (before * numbers * np.log1p(numbers)))

"""Bounds on the mean of a distribution on [0, 1] by betting (Waudby-Smith and Ramdas).

arXiv 2010.09686, section 4. A gambler bets on each sample that the mean is not ``m``, with a stake
that depends only on earlier samples. If the mean is ``m``, the capital reaches ``1 / delta`` with
probability ``delta`` at most (Ville's inequality), so every ``m`` at which it did is refuted. The
bounds differ in their stakes: ``mean_upper_bound`` is tightest at a sample size known in advance,
``mean_interval`` holds at all sample sizes at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq

Samples = npt.NDArray[np.float64]
Interval = tuple[float, float]

# A mean of 0 would make the stakes, or the logarithm of the capital, infinite.
_NEXT_TO_0 = 1e-12
# The largest part of the capital that one sample may cost.
_MOST_AT_STAKE = 0.75


def mean_upper_bound(losses: npt.ArrayLike, delta: float) -> float:
    """An upper bound on the mean loss: the lowest mean that is refuted as too high.

    The stakes are for a fixed number of samples. Tight where losses vary little. The bound depends
    on the order of the losses, which are shuffled with a fixed seed.

    Args:
        losses: ``[n]``, of images drawn independently, at least one.
        delta: probability of a bound below the mean, in (0, 1).

    Returns:
        In (0, 1]; 1 if no mean is refuted.

    Raises:
        ValueError: a loss is outside [0, 1], there is none, or ``delta`` is outside (0, 1).
    """
    check_probability("delta", delta)
    values = np.random.default_rng(0).permutation(checked_losses(losses))
    limit = math.log(1 / delta)
    stakes = np.minimum(np.sqrt(2 * limit / (len(values) * _variances_before(values))), 1)

    def excess(mean: float) -> float:
        log_capital = np.log1p(-stakes * (values - mean)).cumsum()
        return float(log_capital.max()) + math.log(delta)

    if excess(1.0) < 0:
        return 1.0
    return _root(excess, tolerance=1e-12)


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """A confidence interval of the mean that holds however often it is computed.

    The hedged capital process of the paper, with predictable stakes. For any distribution on
    [0, 1] and any number of samples: with probability ``confidence`` or more, *all* intervals of
    ``values[:1], values[:2], ...`` contain the mean, so stopping at the worst moment is as safe as
    looking once. The interval depends on the order of the samples, which must not depend on their
    values. The mean of zeros and ones is the share of ones.

    Args:
        values: independent samples in [0, 1]; without any, the interval is [0, 1].
        confidence: in (0, 1).

    Raises:
        ValueError: a value is not in [0, 1].
    """
    samples = np.asarray(values, dtype=np.float64)
    if not ((samples >= 0) & (samples <= 1)).all():
        raise ValueError(f"values must be in [0, 1], not from {samples.min()} to {samples.max()}")
    limit = math.log(2 / (1 - confidence))
    low, high = _lower_bound(samples, limit), 1.0 - _lower_bound(1.0 - samples, limit)
    # The bounds may cross where the samples are not from one distribution.
    mean = float(samples.mean()) if len(samples) else low
    return min(low, mean), max(high, mean)


def checked_losses(losses: npt.ArrayLike) -> Samples:
    """Losses as float64.

    Raises:
        ValueError: one is outside [0, 1], or there is none.
    """
    values = np.asarray(losses, np.float64)
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError("the losses of at least one image are needed")
    # Written so that nan fails as well.
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"losses must be in [0, 1], not from {values.min()} to {values.max()}")
    return values


def check_probability(name: str, value: float) -> None:
    """Raise a ValueError unless the value is in (0, 1)."""
    if not 0 < value < 1:
        raise ValueError(f"{name} must be between 0 and 1, not {value}")


def _lower_bound(samples: Samples, limit: float) -> float:
    """The largest mean that is refuted as too low: betting on more has won ``exp(limit)``."""
    numbers = np.arange(1, len(samples) + 1)
    stakes = np.sqrt(2 * limit / (_variances_before(samples) * numbers * np.log1p(numbers)))

    def excess(mean: float) -> float:
        # Each factor falls as the mean rises, so there is one root at most.
        factors = np.minimum(stakes, _MOST_AT_STAKE / mean) * (samples - mean)
        return float(np.log1p(factors).sum()) - limit

    if excess(_NEXT_TO_0) < 0:
        return 0.0
    return _root(excess, tolerance=1e-10)


def _variances_before(samples: Samples) -> Samples:
    """The variance of the samples before each one, ``[n]``, with one prior sample of 1/2."""
    numbers = np.arange(1, len(samples) + 1)
    means = (0.5 + samples.cumsum()) / (numbers + 1)
    variances = (0.25 + ((samples - means) ** 2).cumsum()) / (numbers + 1)
    return np.concatenate([[0.25], variances])[: len(samples)]


def _root(excess: Callable[[float], float], *, tolerance: float) -> float:
    return float(brentq(excess, _NEXT_TO_0, 1.0, xtol=tolerance))

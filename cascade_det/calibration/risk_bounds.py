"""What a sample of losses in [0, 1] says of their mean: p-values and upper confidence bounds.

Losses are ``[n]`` or, where many settings are held against one level, ``[..., n]``, one value
per image, of images drawn independently (or exchangeably) from where the answer is wanted. A
p-value is that of the hypothesis "the mean is above ``risk``"; a bound is at least the mean with
probability ``1 - delta``.

Sources: Bates et al. (arXiv 2101.02703) and Angelopoulos et al. (arXiv 2110.01052) for Hoeffding
and Hoeffding-Bentkus, Waudby-Smith and Ramdas (arXiv 2010.09686) for bounds by betting.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import bdtr, betaincinv, rel_entr

Losses = npt.NDArray[np.float64]
# A sum of n floats may come out a hair above the whole number that it is, and rounding it up
# would then count one loss more.
ROUNDING = 1e-9


def hoeffding_ucb(losses: npt.ArrayLike, delta: float) -> float:
    """Hoeffding's bound on the mean of ``[n]`` losses; at most 1.

    Raises:
        ValueError: a loss is outside [0, 1], there is none, or ``delta`` is outside (0, 1).
    """
    values = checked_losses(losses)
    check_probability("delta", delta)
    return min(1.0, float(values.mean()) + math.sqrt(math.log(1 / delta) / (2 * len(values))))


def hoeffding_bentkus_p_value(losses: npt.ArrayLike, risk: float) -> Losses:
    """The smaller of Hoeffding's p-value (in its tight form) and Bentkus's; at most 1.

    Args:
        losses: ``[..., n]``.
        risk: level that the mean is held against, in (0, 1).

    Returns:
        float64 ``[...]``; rises with the sum of the losses.

    Raises:
        ValueError: a loss is outside [0, 1], there is none, or ``risk`` is outside (0, 1).
    """
    values = checked_losses(losses)
    check_probability("risk", risk)
    return _hoeffding_bentkus(values.sum(axis=-1), values.shape[-1], risk)


def hoeffding_bentkus_ucb(losses: npt.ArrayLike, delta: float) -> float:
    """The highest level that ``hoeffding_bentkus_p_value`` does not reject for ``[n]`` losses.

    Raises:
        ValueError: a loss is outside [0, 1], there is none, or ``delta`` is outside (0, 1).
    """
    values = checked_losses(losses)
    check_probability("delta", delta)
    total, mean = values.sum(), float(values.mean())
    if mean >= 1:
        return 1.0

    def excess(risk: float) -> float:
        return float(_hoeffding_bentkus(total, len(values), risk)) - delta

    # From the mean, where the p-value is 1, it falls to 0 at 1.
    return float(brentq(excess, mean, 1.0, xtol=1e-12))


def binomial_p_value(losses: npt.ArrayLike, risk: float) -> Losses:
    """The exact p-value of losses that are 0 or 1.

    Args:
        losses: ``[..., n]``.
        risk: level that the mean is held against, in (0, 1).

    Raises:
        ValueError: a loss is neither 0 nor 1, there is none, or ``risk`` is outside (0, 1).
    """
    values = _checked_binary(losses)
    check_probability("risk", risk)
    return bdtr(values.sum(axis=-1), values.shape[-1], risk)


def binomial_ucb(losses: npt.ArrayLike, delta: float) -> float:
    """The exact (Clopper-Pearson) bound on the mean of ``[n]`` losses that are 0 or 1.

    Raises:
        ValueError: a loss is neither 0 nor 1, there is none, or ``delta`` is outside (0, 1).
    """
    values = _checked_binary(losses)
    check_probability("delta", delta)
    ones, zeros = values.sum(), (1 - values).sum()
    return float(betaincinv(ones + 1, zeros, 1 - delta)) if zeros else 1.0


def wsr_ucb(losses: npt.ArrayLike, delta: float, *, seed: int | None = 0) -> float:
    """The bound of Waudby-Smith and Ramdas, tight where losses vary little; 1 where there is none.

    A gambler bets before each loss that it is below ``m``, with a stake that the losses before
    it decide. A mean of ``m`` or more lets the capital reach ``1 / delta`` with probability
    ``delta`` at most, so the bound is the lowest ``m`` at which it did.

    Args:
        losses: ``[n]``.
        delta: probability of a bound below the mean.
        seed: the bound depends on the order of the losses; this one shuffles them. ``None``: they
            are in random order already.

    Raises:
        ValueError: a loss is outside [0, 1], there is none, or ``delta`` is outside (0, 1).
    """
    values = checked_losses(losses)
    check_probability("delta", delta)
    if seed is not None:
        values = np.random.default_rng(seed).permutation(values)
    counts = np.arange(1, len(values) + 1)
    means = (0.5 + values.cumsum()) / (counts + 1)
    variances = (0.25 + ((values - means) ** 2).cumsum()) / (counts + 1)
    known = np.concatenate([[0.25], variances[:-1]])
    stakes = np.minimum(np.sqrt(2 * math.log(1 / delta) / (len(values) * known)), 1)

    def excess(mean: float) -> float:
        log_capital = np.log1p(-stakes * (values - mean)).cumsum()
        return float(log_capital.max()) + math.log(delta)

    if excess(1.0) < 0:
        return 1.0
    # Not from 0, where a stake of 1 on a loss of 1 leaves a capital of 0, whose log is infinite.
    return float(brentq(excess, 1e-12, 1.0, xtol=1e-12))


def checked_losses(losses: npt.ArrayLike) -> Losses:
    """Losses as float64.

    Raises:
        ValueError: one is outside [0, 1], or there is none.
    """
    values = np.asarray(losses, np.float64)
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError("the losses of at least one image are needed")
    # Written so that nan fails as well.
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(
            f"losses must be in [0, 1], not from {values.min()} to {values.max()}: clip them, or "
            "scale both them and the level"
        )
    return values


def check_probability(name: str, value: float) -> None:
    """Raise a ValueError unless the value is between 0 and 1."""
    if not 0 < value < 1:
        raise ValueError(f"{name} must be between 0 and 1, not {value}")


def _hoeffding_bentkus(total: npt.ArrayLike, count: int, risk: float) -> Losses:
    total = np.asarray(total)
    mean = np.minimum(total / count, risk)
    divergence = rel_entr(mean, risk) + rel_entr(1 - mean, 1 - risk)
    bentkus = math.e * bdtr(np.ceil(total - ROUNDING), count, risk)
    return np.minimum(np.minimum(np.exp(-count * divergence), bentkus), 1)


def _checked_binary(losses: npt.ArrayLike) -> Losses:
    values = checked_losses(losses)
    if not np.isin(values, (0, 1)).all():
        raise ValueError("the binomial bounds hold for losses of 0 and 1 alone")
    return values

"""How early a cascade may exit so that what is lost stays below a level, with a guarantee.

The risk of a setting is the expected loss of an image, a number in [0, 1] such as
``reproduction_loss``; average precision is no mean over images, so nothing is promised of it.
Losses are ``[M, n]``: of M settings on n images. Setting 0 is the full cascade, and is what comes
out where nothing else can be shown to be safe. The guarantees hold for images that are
exchangeable with the calibration images, and if the settings were fixed (their thresholds, their
order, the learned parts that they use) without looking at these.

=================  =====================================  ==========================
selector           promise for the setting it returns     order of the settings
=================  =====================================  ==========================
``crc``            E[risk] <= level                       safe to risky
``ucb``            P(risk <= level) >= 1 - delta          safe to risky
``fixed_sequence`` P(risk <= level) >= 1 - delta          safe to risky
``pareto_testing`` P(risk <= level) >= 1 - delta          any; found on half the images
=================  =====================================  ==========================

"Safe to risky" is a guess for ``ucb`` and ``fixed_sequence``: where it is wrong they exit later
than they could, but the promise holds.

Sources: conformal risk control (arXiv 2208.02814), risk-controlling prediction sets (2101.02703),
Learn then Test (2110.01052), Pareto Testing (2210.07913), early exits (2405.20915).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cascade_det.calibration.risk_bounds import (
    ROUNDING,
    Losses,
    check_probability,
    checked_losses,
    hoeffding_bentkus_p_value,
    wsr_ucb,
)
from cascade_det.errors import CascadeDetError


class SampleTooSmallError(CascadeDetError, ValueError):
    """So few images that nothing could be shown of them, whatever their losses."""


@dataclass(frozen=True)
class ParetoTest:
    """What ``pareto_testing`` did.

    Attributes:
        setting: the one to use: index into the settings; 0 if none was shown to be safe.
        front: int64 ``[F]``, the settings in the order of their tests, safe and dear to risky and
            cheap.
        p_values: float64 ``[F]``, on the testing images.
        choosing_images: int64, indices of the images that found the front.
        testing_images: int64, indices of the others, which the promise comes from.
    """

    setting: int
    front: npt.NDArray[np.int64]
    p_values: npt.NDArray[np.float64]
    choosing_images: npt.NDArray[np.int64]
    testing_images: npt.NDArray[np.int64]


def smallest_sample(risk: float, delta: float | None = None) -> int:
    """How many images it takes until a setting that loses nothing on any of them passes.

    Args:
        risk: level to stay below, in (0, 1).
        delta: probability of a failure, for ``fixed_sequence`` and ``pareto_testing`` (which needs
            as many to test with); ``None``: for ``crc``, which has none.

    Raises:
        ValueError: ``risk`` or ``delta`` is outside (0, 1).
    """
    check_probability("risk", risk)
    if delta is None:
        return max(1, math.ceil(1 / risk - 1 - ROUNDING))
    check_probability("delta", delta)
    return max(1, math.ceil(math.log(delta) / math.log1p(-risk) - ROUNDING))


def check_sample_size(num_images: int, risk: float, delta: float | None = None) -> None:
    """Refuse in advance what ``smallest_sample`` says cannot succeed.

    Raises:
        SampleTooSmallError: it says how many images are needed.
    """
    needed = smallest_sample(risk, delta)
    if num_images < needed:
        wanted = f"risk {risk}" if delta is None else f"risk {risk} and delta {delta}"
        raise SampleTooSmallError(
            f"{num_images} images cannot show {wanted}: {needed} are needed even if no image "
            "loses anything. Use more calibration images, or ask for less"
        )


def crc(losses: npt.ArrayLike, risk: float) -> int:
    """Conformal risk control: the riskiest setting with ``(sum of losses + 1) / (n + 1) <= risk``.

    Its proof needs losses that never fall from safe to risky, so each image's loss is raised to
    the highest one so far.

    Args:
        losses: ``[M, n]``, safe to risky.
        risk: bound on the expected loss of an image.

    Raises:
        SampleTooSmallError: see ``smallest_sample``.
    """
    values = _checked_matrix(losses)
    count = values.shape[1]
    check_sample_size(count, risk)
    totals = np.maximum.accumulate(values, axis=0).sum(axis=1)
    return _last_of_run(totals + 1 <= risk * (count + 1) + ROUNDING)


def ucb(
    losses: npt.ArrayLike,
    risk: float,
    delta: float,
    bound: Callable[[Losses, float], float] = wsr_ucb,
) -> int:
    """The setting before the first one whose upper confidence bound is not below ``risk``.

    Args:
        losses: ``[M, n]``, safe to risky.
        risk: bound on the expected loss of an image.
        delta: probability of a higher one.
        bound: of losses ``[n]`` and delta.

    Raises:
        SampleTooSmallError: the bound is not below ``risk`` for n losses of 0.
    """
    values = _checked_matrix(losses)
    without_loss = bound(np.zeros(values.shape[1]), delta)
    if without_loss >= risk:
        raise SampleTooSmallError(
            f"{values.shape[1]} images cannot show risk {risk} and delta {delta}: even if no "
            f"image loses anything, the bound is {without_loss:.4g}. Use more calibration images, "
            "or ask for less"
        )
    for setting, row in enumerate(values):
        if bound(row, delta) >= risk:
            return max(setting - 1, 0)
    return len(values) - 1


def fixed_sequence(
    losses: npt.ArrayLike,
    risk: float,
    delta: float,
    p_value: Callable[[Losses, float], Losses] = hoeffding_bentkus_p_value,
) -> int:
    """Learn then Test: the last setting before the first one that cannot be shown to be safe.

    Args:
        losses: ``[M, n]``, safe to risky.
        risk: bound on the expected loss of an image.
        delta: probability of a higher one.
        p_value: of losses ``[M, n]`` and risk, ``[M]``; ``binomial_p_value`` for losses of 0 and 1.

    Raises:
        SampleTooSmallError: see ``smallest_sample``.
    """
    values = _checked_matrix(losses)
    check_sample_size(values.shape[1], risk, delta)
    return _last_of_run(p_value(values, risk) <= delta)


def pareto_testing(
    losses: npt.ArrayLike, costs: npt.ArrayLike, risk: float, delta: float, *, seed: int = 0
) -> ParetoTest:
    """The cheapest of many settings that can be shown to be safe, whatever their order.

    Half of the images, drawn at random, choose: the Pareto front of mean loss and cost, from safe
    to risky. The other half tests it as ``fixed_sequence`` does.

    Args:
        losses: ``[M, n]``; setting 0 is the full cascade, the others are in any order.
        costs: ``[M]``, what a setting costs: work, milliseconds.
        risk: bound on the expected loss of an image.
        delta: probability of a higher one.
        seed: of the split.

    Raises:
        SampleTooSmallError: fewer than ``smallest_sample(risk, delta)`` images are left to test.
        ValueError: there are not as many costs as settings.
    """
    values = _checked_matrix(losses)
    prices = np.asarray(costs, np.float64)
    if prices.shape != values.shape[:1]:
        raise ValueError(f"{values.shape[0]} settings need as many costs, not {prices.shape}")
    order = np.random.default_rng(seed).permutation(values.shape[1])
    middle = (len(order) + 1) // 2
    choosing, testing = np.sort(order[:middle]), np.sort(order[middle:])
    try:
        check_sample_size(len(testing), risk, delta)
    except SampleTooSmallError as error:
        raise SampleTooSmallError(
            f"{error}. Of {len(order)} images half choose the setting and cannot test it"
        ) from None
    front = pareto_front(values[:, choosing].mean(axis=1), prices)
    p_values = hoeffding_bentkus_p_value(values[front][:, testing], risk)
    passed = p_values <= delta
    setting = int(front[_last_of_run(passed)]) if passed[0] else 0
    return ParetoTest(setting, front, p_values, choosing, testing)


def pareto_front(risks: npt.ArrayLike, costs: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """The settings that no other one beats in risk or cost without being worse in the other.

    Args:
        risks: ``[M]``.
        costs: ``[M]``.

    Returns:
        int64 ``[F]``, indices by rising risk, which is by falling cost; of equal settings the
        first.
    """
    prices = np.asarray(costs, np.float64)
    by_risk = np.lexsort((prices, np.asarray(risks)))
    cheapest_so_far = np.minimum.accumulate(prices[by_risk])
    return by_risk[np.diff(cheapest_so_far, prepend=np.inf) < 0]


def _checked_matrix(losses: npt.ArrayLike) -> Losses:
    values = checked_losses(losses)
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(f"losses must be [settings, images], not {list(values.shape)}")
    return values


def _last_of_run(passed: npt.NDArray[np.bool_]) -> int:
    # Up to the first failure: what passes behind it is not covered by the proofs.
    return max(int(np.cumprod(passed).sum()) - 1, 0)

"""How early a cascade may exit so that its risk stays below a level, with a guarantee.

The risk of a setting is the expected loss of an image, a number in [0, 1]; average precision is
not a mean over images, so it has no guarantee. The guarantee holds for images that are exchangeable
with the calibration images, and for settings (their thresholds, order and learned parts) that were
fixed without these images and are tested by Learn then Test (2110.01052): one path, or by Pareto
testing (2210.07913) the best settings of a search on other images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr, rel_entr

from cascade_det.errors import CascadeDetError
from cascade_det.evaluation.mean_bounds import checked_losses

# A sum of n floats may come out slightly above the whole number that it is, and rounding it up
# would then count one loss more.
_ROUNDING = 1e-9


class SampleTooSmallError(CascadeDetError, ValueError):
    """Too few images to show anything, even if none loses anything."""


def smallest_sample(risk: float, delta: float) -> int:
    """The number of images at which a setting that loses nothing on any of them passes.

    Args:
        risk: level to stay below, in (0, 1).
        delta: probability of a failure, in (0, 1).

    """
    return max(1, math.ceil(math.log(delta) / math.log1p(-risk) - _ROUNDING))


def fixed_sequence(losses: Iterable[npt.ArrayLike], risk: float, delta: float) -> int:
    """The last setting before the first one that cannot be shown to be safe.

    Fixed-sequence testing of Learn then Test: P(risk <= level) >= 1 - delta for the setting that
    is returned. Where the order is not from safe to risky, the promise holds, but an earlier
    setting than necessary may be returned.

    Args:
        losses: ``[n]`` losses in [0, 1] of each setting, safe to risky; the first one is the full
            cascade, which needs no test. No losses are read after the first failure.
        risk: bound on the expected loss of an image, in (0, 1).
        delta: probability of a higher one.

    Returns:
        The index of the setting.
    """
    passed = -1
    for of_setting in losses:
        if hoeffding_bentkus_p_value(of_setting, risk) > delta:
            break
        passed += 1
    return max(passed, 0)


def hoeffding_bentkus_p_value(losses: npt.ArrayLike, risk: float) -> float:
    """The p-value of "the mean loss is above ``risk``"; rises with the sum of the losses.

    The smaller one of Hoeffding's (in its tight form) and Bentkus's, at most 1 (arXiv 2101.02703,
    2110.01052).

    Args:
        losses: ``[n]`` in [0, 1].
        risk: in (0, 1).

    Raises:
        ValueError: a loss is outside [0, 1], or there is none.
    """
    values = checked_losses(losses)
    total, count = values.sum(), len(values)
    mean = np.minimum(total / count, risk)
    divergence = rel_entr(mean, risk) + rel_entr(1 - mean, 1 - risk)
    bentkus = math.e * bdtr(np.ceil(total - _ROUNDING), count, risk)
    return float(np.minimum(np.minimum(np.exp(-count * divergence), bentkus), 1))


def pareto_front(risks: npt.ArrayLike, costs: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """The settings that no other one beats in risk or cost without being worse in the other.

    Args:
        risks: ``[M]``.
        costs: ``[M]``.

    Returns:
        int64 ``[F]``, indices by rising risk, which is by falling cost; of equal settings the
        first.
    """
    of_setting = np.asarray(costs, np.float64)
    by_risk = np.lexsort((of_setting, np.asarray(risks)))
    cheapest_so_far = np.minimum.accumulate(of_setting[by_risk])
    return by_risk[np.diff(cheapest_so_far, prepend=np.inf) < 0]

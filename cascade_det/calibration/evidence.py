"""What some images say of exits: their trials, and the changes of AP with their bounds.

N images, F folds, B resamples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

from cascade_det.calibration.bootstrap import average_precisions, resamples
from cascade_det.calibration.search import Setting
from cascade_det.calibration.trials import SEGM, ExitTrials, Trial
from cascade_det.core import ExitPolicy

FOLDS = 5
CONFIDENCE = 0.95  # of a one-sided bound
ROUNDS = 200
# Of the bound of a fold, which decides nothing but the report.
FOLD_ROUNDS = 50
# Indices of images, with repetitions.
Images = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]


class Evidence:
    """What all images say of a setting, those outside each fold, and resamples.

    Args:
        trials: of the N images.
        policy: gives the exits of a setting.
        metric: the AP that bounds are of.
        seed: of the folds.

    Attributes:
        folds: int64 ``[N]``, the fold of each image.
        num_folds: F.
        num_subsets: ``1 + F + B``, all images, those outside each fold, and each resample.
        by_id: int64 ``[N]``, indices of the images by ascending id, the order of matches.
    """

    def __init__(
        self, trials: ExitTrials, policy: Callable[[Setting], ExitPolicy], *, metric: str, seed: int
    ) -> None:
        self.trials = trials
        self.metric = metric
        self._policy = policy
        self._tried: dict[str, Trial] = {}
        self._full_aps: dict[str, Numbers] | None = None
        self._changes: dict[str, dict[str, Numbers]] = {}
        count = len(trials.recording.image_ids)
        self.num_folds = min(FOLDS, count)
        self.num_subsets = 1 + self.num_folds + ROUNDS
        self.by_id = np.argsort(trials.recording.image_ids)
        order = np.random.default_rng(seed).permutation(count)
        self.folds = np.empty(count, np.int64)
        self.folds[order] = np.arange(count) % self.num_folds
        without = np.arange(self.num_folds)[:, None] != self.folds
        self._weights = np.concatenate(
            [
                np.ones((1, count)),
                without,
                resamples(np.ones(count), ROUNDS),
                *(resamples(1.0 * kept, FOLD_ROUNDS) for kept in without),
            ]
        )

    @property
    def full(self) -> Trial:
        """The full cascade on all images."""
        return self.trials.full

    def trial(self, setting: Setting) -> Trial:
        """The trial of a setting on all images, replayed once."""
        if not setting:
            return self.full
        key = json.dumps(setting, sort_keys=True)
        if key not in self._tried:
            self._tried[key] = self.trials.replay(self._policy(setting))
        return self._tried[key]

    def images(self) -> list[Images]:
        """The images of each subset, by index, with repetitions."""
        rows = self._weights[: self.num_subsets].astype(np.int64)
        return [np.arange(len(row)).repeat(row) for row in rows]

    def resampled_changes(self, setting: Setting) -> dict[str, Numbers]:
        """The change of each metric from the full cascade on each resample, ``[B]``."""
        return {name: self._resampled(own) for name, own in self._change(setting).items()}

    def deviation(self, setting: Setting) -> float:
        """The standard deviation of the change of AP by bootstrap, in percent points."""
        return _deviation(self._resampled(self._change(setting)[self.metric]))

    def least_bound(self, setting: Setting) -> float:
        """The bound of the drop of AP if nothing were lost on these images, and usually nothing.

        The deviation alone decides, not which way AP changes.
        """
        return float(np.sqrt(2) * _factor(len(self.folds)) * self.deviation(setting))

    def bounds(self, setting: Setting, scale: float) -> Numbers:
        """Below which the drop of AP of as many further images is, with ``CONFIDENCE``.

        A drop is known from these images, with its deviation by bootstrap, and from other data,
        where it was between 0 and its scale. Both are weighed by their precision (a normal prior),
        so that images that say little leave what is usual. The bound is that of the predictive
        distribution, with Student's quantile, as the deviation of few images is itself uncertain.
        It is not below the drop of these images.

        Args:
            setting: from the full cascade to which AP drops.
            scale: of the drop in other data, in percent points; infinite where nothing is known.

        Returns:
            In percent points, for each subset: ``[1 + F + B]``.
        """
        drops = -self._change(setting)[self.metric]
        of_folds = drops[self.num_subsets :].reshape(self.num_folds, -1)
        deviations = [_deviation(x) for x in (self._resampled(drops), *of_folds)]
        counts = self._weights[: 1 + self.num_folds].sum(axis=1).tolist()
        widths = np.array([_factor(n) * x for n, x in zip(counts, deviations, strict=True)])
        widths = np.concatenate([widths, np.full(ROUNDS, widths[0])])
        known = drops[: self.num_subsets]
        if math.isinf(scale):
            return known + np.sqrt(2) * widths
        quantile = NormalDist().inv_cdf(CONFIDENCE)
        share = scale**2 / (scale**2 + (widths / quantile) ** 2)
        expected = share * known + (1 - share) * scale / 2
        # Where these images lose more, whatever is usual does not excuse it.
        bounds: Numbers = np.maximum(expected + np.sqrt(1 + share) * widths, known)
        return bounds

    def _resampled(self, values: Numbers) -> Numbers:
        return values[1 + self.num_folds : self.num_subsets]

    def _change(self, setting: Setting) -> dict[str, Numbers]:
        """The change of each metric from the full cascade, for all weights of the images."""
        key = json.dumps(setting, sort_keys=True)
        if key not in self._changes:
            if self._full_aps is None:
                self._full_aps = self._aps(self.full)
            own = self._aps(self.trial(setting))
            self._changes[key] = {name: own[name] - x for name, x in self._full_aps.items()}
        return self._changes[key]

    def _aps(self, trial: Trial) -> dict[str, Numbers]:
        weights = self._weights[:, self.by_id]
        aps = average_precisions(trial.matched, weights)
        if trial.matched_masks is not None:
            of_masks = average_precisions(trial.matched_masks, weights)
            aps |= {SEGM + name: values for name, values in of_masks.items()}
        return aps


def _deviation(values: Numbers) -> float:
    """Of resamples; nan unless two or more have objects."""
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else np.nan


def _factor(count: float) -> float:
    """Deviations in a bound, of ``count`` images; nan for a single one."""
    if count < 2:
        return np.nan
    # Of few images, a bootstrap's deviation is too small by the second factor.
    return float(student.ppf(CONFIDENCE, count - 1) * np.sqrt(count / (count - 1)))

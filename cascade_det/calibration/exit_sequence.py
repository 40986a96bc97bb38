"""Chooses one of a sequence of settings, from the full cascade to risky exits, with few images.

A sequence is tested from its safe end, and ends with the first test that fails: no setting behind
it can be chosen by luck. The same choice is made without each of some folds of the images, which
report the change of AP, and on resamples of the images, for its uncertainty.

N images, P settings, F folds, B resamples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

from cascade_det.calibration.bootstrap import (
    Difference,
    average_precision,
    average_precisions,
    difference,
    resamples,
)
from cascade_det.calibration.image_matching import mix_images
from cascade_det.calibration.search import Setting
from cascade_det.calibration.trials import SEGM, ExitTrials, Trial
from cascade_det.core import ExitPolicy

FOLDS = 5
# Of a one-sided bound: deviations of few images miss what rarely happens.
CONFIDENCE = 0.99
ROUNDS = 200
# Of the bound of a fold, which decides nothing but the report.
FOLD_ROUNDS = 50
# Indices of images, with repetitions.
Images = npt.NDArray[np.int64]
_Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """Places in a sequence.

    Attributes:
        place: chosen on all images.
        others: int64 ``[F + B]``, chosen without each fold, and on each resample.
    """

    place: int
    others: Images


class ExitSequence:
    """Settings by rising risk, and their trials on the images that judge them.

    Args:
        trials: of the N images.
        settings: P of them; the first one is empty, the full cascade.
        scales: P drops of AP, in percent points, as other data made expect; infinite where nothing
            is known.
        policy: gives the exits of a setting.
        metric: the AP that counts.
        seed: of the folds.

    Attributes:
        folds: int64 ``[N]``, the fold of each image.
    """

    def __init__(
        self,
        trials: ExitTrials,
        settings: Sequence[Setting],
        scales: Sequence[float],
        policy: Callable[[Setting], ExitPolicy],
        *,
        metric: str,
        seed: int,
    ) -> None:
        self.trials = trials
        self.settings = list(settings)
        self.scales = list(scales)
        self.metric = metric
        self._policy = policy
        self._tried: dict[str, Trial] = {}
        self._full_aps: dict[str, _Numbers] | None = None
        self._changes: dict[str, dict[str, _Numbers]] = {}
        count = len(trials.recording.image_ids)
        self._by_id = np.argsort(trials.recording.image_ids)
        order = np.random.default_rng(seed).permutation(count)
        self.folds = np.empty(count, np.int64)
        self.folds[order] = np.arange(count) % min(FOLDS, count)
        without = np.arange(min(FOLDS, count))[:, None] != self.folds
        self._weights = np.concatenate(
            [
                np.ones((1, count)),
                without,
                resamples(np.ones(count), ROUNDS),
                *(resamples(1.0 * kept, FOLD_ROUNDS) for kept in without),
            ]
        )
        self._num_folds = len(without)

    def trial(self, setting: Setting) -> Trial:
        """The trial of a setting on all images, replayed once."""
        if not setting:
            return self.trials.full
        key = json.dumps(setting, sort_keys=True)
        if key not in self._tried:
            self._tried[key] = self.trials.replay(self._policy(setting))
        return self._tried[key]

    def setting(self, place: int, extra: Setting | None = None) -> Setting:
        """A setting with further keys; the full cascade has none."""
        own = self.settings[place]
        return {**own, **extra} if own and extra else own

    def within(self, most: float) -> Choice:
        """The riskiest setting up to which a bound of the drop of AP stays within a limit.

        A drop is known from these images, with its deviation by bootstrap, and from other data,
        where it was between 0 and its scale. Both are weighed by their precision (a normal prior),
        so that images that say little leave what is usual. The bound is that of ``CONFIDENCE``,
        with Student's quantile, as the deviation of few images is itself uncertain, and not below
        the drop of these images.

        Args:
            most: percent points.
        """
        last = np.zeros(1 + self._num_folds + ROUNDS, np.int64)
        holds = np.ones(len(last), bool)
        for place in range(1, len(self.settings)):
            drops = -self._change(self.settings[place])[self.metric]
            holds &= self._bounds(drops, self.scales[place]) <= most
            if not holds.any():
                break
            last[holds] = place
        return Choice(int(last[0]), last[1:])

    def reaching(self, reaches: Callable[[Trial, Images], bool]) -> Choice | None:
        """The safest setting that reaches a target; ``None`` if none does.

        Args:
            reaches: whether a trial does so on some of the images, by index, with repetitions.
        """
        trials = [self.trial(setting) for setting in self.settings]
        first, *others = (
            next((place for place, trial in enumerate(trials) if reaches(trial, images)), None)
            for images in self._images()
        )
        if first is None:
            return None
        last = len(trials) - 1
        return Choice(first, np.array([last if place is None else place for place in others]))

    def passing(self, last_passed: Callable[[Sequence[Trial], Images], int]) -> Choice:
        """The last setting that passes a test.

        Args:
            last_passed: its place, by the trials of all settings and the images that count.
        """
        trials = [self.trial(setting) for setting in self.settings]
        first, *others = (last_passed(trials, images) for images in self._images())
        return Choice(first, np.array(others))

    def changes(self, choice: Choice, extra: Setting | None = None) -> dict[str, Difference]:
        """The changes of all metrics from the full cascade, cross-fitted.

        Each image has the setting that was chosen without its fold. The intervals are those of
        resamples, each with its own choice.

        Args:
            choice: by one of the methods above.
            extra: further keys for every setting.
        """
        folds, resampled = np.split(choice.others, [self._num_folds])
        places, which = np.unique(folds[self.folds], return_inverse=True)
        trials = [self.trial(self.setting(place, extra)) for place in places.tolist()]
        mixed = _mixed(trials, which[self._by_id])
        of_resamples = [self._change(self.setting(p, extra)) for p in resampled.tolist()]
        found = {}
        for name, value in mixed.items():
            values = np.array([self._resampled(own[name])[b] for b, own in enumerate(of_resamples)])
            change = value - self.trials.full.metrics[name]
            found[name] = difference(change, values + change - np.nanmean(values))
        return found

    def bound(self, place: int) -> float:
        """The bound of the drop of AP of a setting, see ``within``."""
        drops = -self._change(self.settings[place])[self.metric]
        return float(self._bounds(drops, self.scales[place])[0])

    def deviation(self, setting: Setting) -> float:
        """The standard deviation of the change of AP by bootstrap, in percent points."""
        return _deviation(self._resampled(self._change(setting)[self.metric]))

    def _images(self) -> list[Images]:
        """All images, those outside each fold, and those of each resample."""
        rows = self._weights[: 1 + self._num_folds + ROUNDS].astype(np.int64)
        return [np.arange(len(row)).repeat(row) for row in rows]

    def _resampled(self, values: _Numbers) -> _Numbers:
        return values[1 + self._num_folds :][:ROUNDS]

    def _bounds(self, drops: _Numbers, scale: float) -> _Numbers:
        """Of the drop of all images, of those outside each fold, and of resamples, ``[1 + F + B]``.

        Args:
            drops: for all weights of the images.
            scale: of the drop in other data.
        """
        of_folds = drops[1 + self._num_folds + ROUNDS :].reshape(self._num_folds, -1)
        deviations = [_deviation(x) for x in (self._resampled(drops), *of_folds)]
        counts = self._weights[: 1 + self._num_folds].sum(axis=1).tolist()
        widths = np.array([_factor(n) * x for n, x in zip(counts, deviations, strict=True)])
        widths = np.concatenate([widths, np.full(ROUNDS, widths[0])])
        known = drops[: len(widths)]
        if math.isinf(scale):
            return known + widths
        quantile = NormalDist().inv_cdf(CONFIDENCE)
        share = scale**2 / (scale**2 + (widths / quantile) ** 2)
        expected = share * known + (1 - share) * scale / 2
        # Where these images lose more, whatever is usual does not excuse it.
        bounds: _Numbers = np.maximum(expected + np.sqrt(share) * widths, known)
        return bounds

    def _change(self, setting: Setting) -> dict[str, _Numbers]:
        """The change of each metric from the full cascade, for all weights of the images."""
        key = json.dumps(setting, sort_keys=True)
        if key not in self._changes:
            if self._full_aps is None:
                self._full_aps = self._aps(self.trials.full)
            own = self._aps(self.trial(setting))
            self._changes[key] = {name: own[name] - x for name, x in self._full_aps.items()}
        return self._changes[key]

    def _aps(self, trial: Trial) -> dict[str, _Numbers]:
        weights = self._weights[:, self._by_id]
        aps = average_precisions(trial.matched, weights)
        if trial.matched_masks is not None:
            of_masks = average_precisions(trial.matched_masks, weights)
            aps |= {SEGM + name: values for name, values in of_masks.items()}
        return aps


def _deviation(values: _Numbers) -> float:
    """Of resamples; nan unless two or more have objects."""
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else np.nan


def _factor(count: float) -> float:
    """Deviations in a bound, of ``count`` images; nan for a single one."""
    if count < 2:
        return np.nan
    # Of few images, a bootstrap's deviation is too small by the second factor.
    return float(student.ppf(CONFIDENCE, count - 1) * np.sqrt(count / (count - 1)))


def _mixed(trials: Sequence[Trial], which: Images) -> dict[str, float]:
    """Metrics where each image has the detections of one of the trials.

    Args:
        trials: of the same images.
        which: ``[N]``, the index of the trial for each image, by ascending id.
    """
    metrics = average_precision(mix_images([trial.matched for trial in trials], which))
    masks = [trial.matched_masks for trial in trials if trial.matched_masks is not None]
    if masks:
        of_masks = average_precision(mix_images(masks, which))
        metrics |= {SEGM + name: value for name, value in of_masks.items()}
    return metrics

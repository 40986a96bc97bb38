"""Chooses one of a sequence of settings, from the full cascade to risky exits, with few images.

A sequence is tested from its safe end, and ends with the first test that fails: no setting behind
it can be chosen by luck. The same choice is made without each of some folds of the images, which
report the change of AP, and on resamples of the images, for its uncertainty.

N images, P settings, F folds, B resamples.
"""

from __future__ import annotations

import copy
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
    average_precisions,
    difference,
    resamples,
)
from cascade_det.calibration.search import Setting
from cascade_det.calibration.trials import SEGM, ExitTrials, Trial, mixed_metrics
from cascade_det.core import ExitPolicy

FOLDS = 5
CONFIDENCE = 0.95  # of a one-sided bound
ROUNDS = 200
# Of the bound of a fold, which decides nothing but the report.
FOLD_ROUNDS = 50
# A step of the tile gate is taken if it saves as much, a share of the time.
LEAST_SAVING = 0.01
# Percent points of AP that a tile gate may lose beside a setting where no limit is known.
USUAL_DROP = 0.02
# Indices of images, with repetitions.
Images = npt.NDArray[np.int64]
_Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """Places in a sequence.

    Attributes:
        place: chosen on all images.
        others: int64 ``[F + B]``, chosen without each fold, and on each resample.
        tile: the step of the tile gate, chosen on all images.
        other_tiles: int64 ``[F + B]``, as ``others``; ``None`` for the whole map in all of them.
    """

    place: int
    others: Images
    tile: int = 0
    other_tiles: Images | None = None

    @property
    def pairs(self) -> Images:
        """Places and steps of the tile gate of ``others``, int64 ``[2, F + B]``."""
        tiles = np.zeros_like(self.others) if self.other_tiles is None else self.other_tiles
        return np.stack([self.others, tiles])


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
        tiles: steps of the tile gate from off to risky, and their drops as ``scales``.

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
        tiles: tuple[Sequence[Setting], Sequence[float]] = (({},), (0.0,)),
    ) -> None:
        self.trials = trials
        self.settings = list(settings)
        self.scales = list(scales)
        self.tile_steps, self._tile_scales = ([*part] for part in tiles)
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

    def setting(self, place: int, extra: Setting | None = None, *, tile: int = 0) -> Setting:
        """A setting with a step of the tile gate and further keys; the full cascade has none."""
        own = {**self.settings[place], **self.tile_steps[tile]}
        return {**own, **extra} if own and extra else own

    def with_settings(self, settings: Sequence[Setting], scales: Sequence[float]) -> ExitSequence:
        """A sequence of other settings on the same images; both know what either has tried."""
        other = copy.copy(self)
        other.settings, other.scales = list(settings), list(scales)
        return other

    def steady_work(self, most: float) -> float:
        """The share of work left by the riskiest setting that changes AP little on these images.

        Up to it, the drop of as many further images would be within a limit, with ``CONFIDENCE``,
        if nothing were lost on these: the deviation alone decides, not which way AP changes.

        Args:
            most: percent points.
        """
        work = 1.0
        for setting in self.settings[1:]:
            deviation = self.deviation(setting)
            if not np.sqrt(2) * _factor(len(self.folds)) * deviation <= most:
                break
            work = self.trial(setting).work
        return work

    def within(self, most: float, *, tile_gate: bool = False) -> Choice:
        """The riskiest setting up to which a bound of the drop of AP stays within a limit.

        A drop is known from these images, with its deviation by bootstrap, and from other data,
        where it was between 0 and its scale. Both are weighed by their precision (a normal prior),
        so that images that say little leave what is usual. As many further images lose less than
        the bound with ``CONFIDENCE``: it is that of the predictive distribution, with Student's
        quantile, as the deviation of few images is itself uncertain. It is not below the drop of
        these images.

        Args:
            most: percent points.
            tile_gate: whether each setting but the full cascade has its ``usual_tile``.
        """
        places, tiles = np.zeros((2, 1 + self._num_folds + ROUNDS), np.int64)
        holds = np.ones(len(places), bool)
        for place in range(1, len(self.settings)):
            tile = self.usual_tile(place) if tile_gate else 0
            drops = -self._change(self.setting(place, tile=tile))[self.metric]
            holds &= self._bounds(drops, self.scales[place] + self._tile_scales[tile]) <= most
            if not holds.any():
                break
            places[holds], tiles[holds] = place, tile
        return Choice(int(places[0]), places[1:], int(tiles[0]), tiles[1:])

    def within_gated(self, most: float, cost: Callable[[Setting], float]) -> Choice:
        """The cheaper one of two choices ``within`` a limit, on all images as on some of them.

        One takes what is left of the limit for the tile gate, see ``within_tiles``, the other one
        has a tile gate in every setting.

        Args:
            most: percent points.
            cost: of a setting.
        """
        after = self.within_tiles(self.within(most), most, cost)
        if len(self._cheap_tiles(after.place, cost)) == 1:  # no gate saves anything
            return after
        beside = self.within(most, tile_gate=True)
        pairs = [
            np.concatenate([[[one.place], [one.tile]], one.pairs], axis=1)
            for one in (after, beside)
        ]
        costs = [
            np.array([cost(self.setting(place, tile=tile)) for place, tile in both.T.tolist()])
            for both in pairs
        ]
        chosen = np.where(costs[1] < (1 - LEAST_SAVING) * costs[0], pairs[1], pairs[0])
        return Choice(int(chosen[0, 0]), chosen[0, 1:], int(chosen[1, 0]), chosen[1, 1:])

    def within_tiles(self, choice: Choice, most: float, cost: Callable[[Setting], float]) -> Choice:
        """A choice with the step of the tile gate that costs least of those within a limit.

        Of the steps, in order, those count up to which the bound of ``within`` stays within the
        limit. Without each fold and on each resample, the step is chosen again, at its own place.

        Args:
            choice: by ``within``.
            most: percent points.
            cost: of a setting; a step is taken if it saves ``LEAST_SAVING`` of it.
        """
        places = np.array([choice.place, *choice.others])
        chosen = np.zeros_like(places)
        for place in np.unique(places).tolist():
            cheap = self._cheap_tiles(place, cost)
            holds = places == place
            for tile in range(1, max(cheap) + 1):
                drops = -self._change(self.setting(place, tile=tile))[self.metric]
                scale = self.scales[place] + self._tile_scales[tile]
                holds = holds & (self._bounds(drops, scale)[: len(holds)] <= most)
                if not holds.any():
                    break
                if tile in cheap:
                    chosen[holds] = tile
        return Choice(choice.place, choice.others, int(chosen[0]), chosen[1:])

    def _cheap_tiles(self, place: int, cost: Callable[[Setting], float]) -> list[int]:
        """The whole map, and each step that costs less than all before it."""
        costs = [cost(self.setting(place, tile=tile)) for tile in range(len(self.tile_steps))]
        cheap = [0]
        for tile, own in enumerate(costs):
            if own < costs[cheap[-1]] and own < (1 - LEAST_SAVING) * costs[0]:
                cheap.append(tile)
        return cheap

    def usual_tile(self, place: int) -> int:
        """The riskiest step of the tile gate that loses no more than the setting usually does.

        A setting of which nothing is known has the riskiest step below ``USUAL_DROP``.
        """
        scale = self.scales[place]
        most = USUAL_DROP if math.isinf(scale) else scale
        return max(tile for tile, drop in enumerate(self._tile_scales) if drop <= most)

    def reaching(
        self, reaches: Callable[[Trial, Images], bool], *, tile_gate: bool = False
    ) -> Choice | None:
        """The safest setting that reaches a target; ``None`` if none does.

        Args:
            reaches: whether a trial does so on some of the images, by index, with repetitions.
            tile_gate: whether each setting is also tried with its ``usual_tile``.
        """
        tiles = [{0, self.usual_tile(p) if tile_gate else 0} for p in range(len(self.settings))]
        candidates = [(place, tile) for place, own in enumerate(tiles) for tile in sorted(own)]
        trials = [self.trial(self.setting(place, tile=tile)) for place, tile in candidates]
        first, *others = (
            next((place for place, trial in enumerate(trials) if reaches(trial, images)), None)
            for images in self._images()
        )
        if first is None:
            return None
        last = len(trials) - 1
        pairs = np.array([candidates[last if place is None else place] for place in others])
        return Choice(candidates[first][0], pairs[:, 0], candidates[first][1], pairs[:, 1])

    def passing(
        self,
        last_passed: Callable[[Sequence[Trial], Images], int],
        *,
        tile_gate: bool = False,
    ) -> Choice:
        """The last setting that passes a test.

        Args:
            last_passed: its place, by the trials of all settings and the images that count.
            tile_gate: whether each setting has its ``usual_tile``.
        """
        tiles = np.array(
            [self.usual_tile(p) if tile_gate else 0 for p in range(len(self.settings))]
        )
        trials = [
            self.trial(self.setting(place, tile=tile)) for place, tile in enumerate(tiles.tolist())
        ]
        first, *others = (last_passed(trials, images) for images in self._images())
        places = np.array(others)
        return Choice(first, places, int(tiles[first]), tiles[places])

    def changes(self, choice: Choice, extra: Setting | None = None) -> dict[str, Difference]:
        """The changes of all metrics from the full cascade, cross-fitted.

        Each image has the setting that was chosen without its fold. The intervals are those of
        resamples, each with its own choice.

        Args:
            choice: by one of the methods above.
            extra: further keys for every setting.
        """
        folds, resampled = np.split(choice.pairs, [self._num_folds], axis=1)
        pairs, which = np.unique(folds[:, self.folds], axis=1, return_inverse=True)
        of_pairs, of_resamples = (
            [self.setting(place, extra, tile=tile) for place, tile in some.T.tolist()]
            for some in (pairs, resampled)
        )
        mixed = mixed_metrics([self.trial(one) for one in of_pairs], which.reshape(-1)[self._by_id])
        found = {}
        for name, value in mixed.items():
            changes = (self._change(one)[name] for one in of_resamples)
            values = np.array([self._resampled(own)[b] for b, own in enumerate(changes)])
            change = value - self.trials.full.metrics[name]
            found[name] = difference(change, values + change - np.nanmean(values))
        return found

    def bound(self, place: int, *, tile: int = 0) -> float:
        """The bound of the drop of AP of a setting, see ``within``."""
        drops = -self._change(self.setting(place, tile=tile))[self.metric]
        return float(self._bounds(drops, self.scales[place] + self._tile_scales[tile])[0])

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
            return known + np.sqrt(2) * widths
        quantile = NormalDist().inv_cdf(CONFIDENCE)
        share = scale**2 / (scale**2 + (widths / quantile) ** 2)
        expected = share * known + (1 - share) * scale / 2
        # Where these images lose more, whatever is usual does not excuse it.
        bounds: _Numbers = np.maximum(expected + np.sqrt(1 + share) * widths, known)
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

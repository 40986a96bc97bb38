"""Chooses one of a sequence of settings, from the full cascade to risky exits, with few images.

A sequence is tested from its safe end, and ends with the first test that fails: no setting behind
it can be chosen by luck. The same choice is made without each of some folds of the images, which
report the change of AP, and on resamples of the images, for its uncertainty.

P settings, F folds, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cascade_det.calibration.bootstrap import Difference, difference
from cascade_det.calibration.evidence import Evidence, Images, Numbers
from cascade_det.calibration.search import Setting
from cascade_det.calibration.trials import Trial, mixed_metrics

# A step of the tile gate is taken if it saves as much, a share of the time.
LEAST_SAVING = 0.01
# Percent points of AP that a tile gate may lose beside a setting where no limit is known.
USUAL_DROP = 0.02


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
    """Settings by rising risk, and what the images that judge them say.

    Args:
        evidence: of these images.
        settings: P of them; the first one is empty, the full cascade.
        scales: P drops of AP, in percent points, as other data made expect; infinite where nothing
            is known.
        tiles: steps of the tile gate from off to risky, and their drops as ``scales``.
    """

    def __init__(
        self,
        evidence: Evidence,
        settings: Sequence[Setting],
        scales: Sequence[float],
        tiles: tuple[Sequence[Setting], Sequence[float]] = (({},), (0.0,)),
    ) -> None:
        self.evidence = evidence
        self.settings = list(settings)
        self.scales = list(scales)
        self.tile_steps, self._tile_scales = ([*part] for part in tiles)

    def setting(self, place: int, extra: Setting | None = None, *, tile: int = 0) -> Setting:
        """A setting with a step of the tile gate and further keys; the full cascade has none."""
        own = {**self.settings[place], **self.tile_steps[tile]}
        return {**own, **extra} if own and extra else own

    def always(self, place: int) -> Choice:
        """The same setting for all images, without each fold, and on each resample."""
        return Choice(place, np.full(self.evidence.num_subsets - 1, place))

    def trial(self, place: int, *, tile: int = 0) -> Trial:
        """The trial of a setting with a step of the tile gate."""
        return self.evidence.trial(self.setting(place, tile=tile))

    def bounds(self, place: int, *, tile: int = 0) -> Numbers:
        """Of the drop of AP of a setting with a step of the tile gate, see ``Evidence.bounds``."""
        scale = self.scales[place] + self._tile_scales[tile]
        return self.evidence.bounds(self.setting(place, tile=tile), scale)

    def steady_work(self, most: float) -> float:
        """The share of work left by the riskiest setting that changes AP little on these images.

        Up to it, ``Evidence.least_bound`` stays within a limit.

        Args:
            most: percent points.
        """
        work = 1.0
        for setting in self.settings[1:]:
            if not self.evidence.least_bound(setting) <= most:
                break
            work = self.evidence.trial(setting).work
        return work

    def within(self, most: float, *, tile_gate: bool = False) -> Choice:
        """The riskiest setting up to which the bound of the drop of AP stays within a limit.

        Args:
            most: percent points.
            tile_gate: whether each setting but the full cascade has its ``usual_tile``.
        """
        places, tiles = np.zeros((2, self.evidence.num_subsets), np.int64)
        holds = np.ones(len(places), bool)
        for place in range(1, len(self.settings)):
            tile = self.usual_tile(place) if tile_gate else 0
            holds &= self.bounds(place, tile=tile) <= most
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
                holds = holds & (self.bounds(place, tile=tile) <= most)
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
        trials = [self.trial(place, tile=tile) for place, tile in candidates]
        first, *others = (
            next((place for place, trial in enumerate(trials) if reaches(trial, images)), None)
            for images in self.evidence.images()
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
        trials = [self.trial(place, tile=tile) for place, tile in enumerate(tiles.tolist())]
        first, *others = (last_passed(trials, images) for images in self.evidence.images())
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
        evidence = self.evidence
        folds, resampled = np.split(choice.pairs, [evidence.num_folds], axis=1)
        pairs, which = np.unique(folds[:, evidence.folds], axis=1, return_inverse=True)
        of_pairs, of_resamples = (
            [self.setting(place, extra, tile=tile) for place, tile in some.T.tolist()]
            for some in (pairs, resampled)
        )
        trials = [evidence.trial(one) for one in of_pairs]
        mixed = mixed_metrics(trials, which.reshape(-1)[evidence.by_id])
        others = [evidence.resampled_changes(one) for one in of_resamples]
        found = {}
        for name, value in mixed.items():
            values = np.array([changes[name][b] for b, changes in enumerate(others)])
            change = value - evidence.full.metrics[name]
            found[name] = difference(change, values + change - np.nanmean(values))
        return found

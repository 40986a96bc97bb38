"""From a target to exits: one of a path of settings, or of the best of a free search."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.calibration.bootstrap import Difference
from cascade_det.calibration.choose import choose
from cascade_det.calibration.evidence import Evidence
from cascade_det.calibration.exit_sequence import Choice, ExitSequence
from cascade_det.calibration.image_matching import ImageMatcher
from cascade_det.calibration.latency_model import LatencyModel
from cascade_det.calibration.progress import progress_bar
from cascade_det.calibration.risk_control import pareto_front
from cascade_det.calibration.score_calibration import UNCHANGED, fit_score_maps, to_last_stage
from cascade_det.calibration.search import Search, Setting, loss_of
from cascade_det.calibration.search_space import exit_parameters, exit_paths, tile_steps
from cascade_det.calibration.target import Target
from cascade_det.calibration.trials import ExitTrials, Recording, Trial
from cascade_det.core import ExitPolicy
from cascade_det.core.exits.learned import LearnedParts
from cascade_det.errors import DatasetError

logger = logging.getLogger(__name__)

# The most settings of a search that are judged.
MOST_PLACES = 20


@dataclass(frozen=True)
class Calibration:
    """The result of a calibration.

    Attributes:
        setting: keys of ``MODEL.CASCADE.EXIT``; empty for the full cascade.
        plain: the same without the score calibration.
        reported: the trial of the setting on the images that judge.
        full: the full cascade on the same images.
        differences: of all metrics from the full cascade, on images that had no part in the choice.
        choice: of the sequence.
        metric: the AP that counts, a key of ``differences``.
    """

    setting: Setting
    plain: Setting
    reported: Trial
    full: Trial
    differences: dict[str, Difference]
    choice: Choice
    metric: str = "AP"

    @property
    def drop(self) -> float:
        """Percent points of AP lost on images that had no part in the choice."""
        return -self.differences[self.metric].value


class Calibrator:
    """Finds exits for targets on a recording.

    All images judge the settings of one path, of ``exit_paths`` the first unless ``choose_path``
    says otherwise. A free search is for many images: one half of them tries settings, and the other
    half judges the best.

    Args:
        cfg: of the recorded model.
        recording: of the full cascade.
        matcher: of the ground truth.
        learned: the model's learned parts.
        score: lowest score of a detection that can be lost.
        seed: of the folds, and of the split into halves.
        metric: the AP that counts: ``AP`` or ``segm/AP``.
        loss: what can be lost: ``boxes`` or ``masks``.

    Attributes:
        trials: on the images that settings are tried on.
        others: on the images that judge; the same without a free search.
        search: everything that was tried.
        sequence: the settings to choose from.
        has_tile_gate: whether tile thresholds were recorded.
        has_masks: whether the cascade has masks.
    """

    def __init__(
        self,
        cfg: CfgNode,
        recording: Recording,
        matcher: ImageMatcher,
        *,
        learned: LearnedParts | None,
        score: float,
        seed: int = 0,
        metric: str = "AP",
        loss: str = "boxes",
    ) -> None:
        self.cfg = cfg
        self.metric = metric
        self.has_masks = recording.masks is not None
        self.has_tile_gate = bool(recording.tile_thresholds)
        self._tiles = tile_steps(recording.tile_thresholds)
        self.num_stages = recording.records[0].num_stages
        # A copy: records are on the CPU, the detector's own parts stay on its device.
        self.learned = None if learned is None else copy.deepcopy(learned).cpu().eval()
        self._trials_of = partial(ExitTrials, matcher=matcher, score=score, loss=loss)
        self._seed = seed
        self.trials = self.others = self._trials_of(recording)
        paths = exit_paths(num_stages=self.num_stages, proposals_per_image=recording.most_proposals)
        evidence = self._evidence()
        self._sequences = [ExitSequence(evidence, *path, self._tiles) for path in paths]
        self._follow(self._sequences[0])

    def _follow(self, sequence: ExitSequence) -> None:
        self.sequence, self.plain = sequence, sequence.settings
        self.search = Search(
            {"path": self.plain}, lambda setting: sequence.evidence.trial(setting).summary()
        )

    def policy(self, setting: Setting) -> ExitPolicy:
        """The exits of a setting, for trials."""
        return build_policy(self.cfg, setting, self.learned)

    def choose_path(self, target: Target) -> None:
        """Follow the path along which AP changes least before its drop could reach the target's.

        To the percent of work; else, and for a guarantee, it is the first one.
        """
        if target.risk is not None:
            return  # it is of settings that these images did not choose
        works = []
        with progress_bar("Comparing paths", len(self._sequences)) as step:
            for sequence in self._sequences:
                works.append(round(sequence.steady_work(target.judged_drop), 2))
                step()
        self._follow(self._sequences[works.index(min(works))])

    def try_path(self) -> None:
        """Try the path, and show the progress."""
        path = range(len(self.plain))
        with progress_bar("Trying the path", len(path)) as self.search.on_trial:
            for place in path:
                self.search.trial((place,))

    def search_freely(self, most_trials: int) -> None:
        """Search on one half of the images, for the other half to judge; shows the progress.

        Args:
            most_trials: the limit of trials.

        Raises:
            DatasetError: one half of the images has no object.
        """
        recording, matcher = self.others.recording, self.others.matcher
        halves = split_images(recording.image_ids, matcher, self._seed)
        self.trials, self.others = (self._trials_of(recording.of_images(half)) for half in halves)
        records = self.trials.recording.records
        parameters = exit_parameters(
            num_stages=self.num_stages,
            objectness=torch.cat([torch.sigmoid(r.objectness[r.rows()]) for r in records]).numpy(),
            proposals_per_image=self.trials.recording.most_proposals,
            learned=() if self.learned is None else self.learned.names,
        )
        self.search = Search(
            parameters,
            lambda setting: self.trials.replay(self.policy(setting)).summary(),
            metric=self.metric,
        )
        with progress_bar("Trying settings", most_trials) as self.search.on_trial:
            self.search.search(most_trials)
        self.plain = self._front()
        mapped = [self.with_scores(setting) for setting in self.plain]
        unknown = [math.inf] * len(mapped)
        self.sequence = ExitSequence(self._evidence(), mapped, unknown, self._tiles)

    def calibrate(self, target: Target, latency: LatencyModel | None = None) -> Calibration:
        """The setting of the sequence for a target.

        Args:
            target: the goal.
            latency: of the device; for a target in milliseconds, and for the tile gate.

        Raises:
            ConfigError: no setting reaches the target.
        """
        return self._evaluate(choose(self.sequence, target, latency))

    def with_gates_off(
        self, found: Calibration, off: tuple[int, ...], target: Target
    ) -> Calibration:
        """A calibration with further gates off, unless it then breaks its promise.

        Args:
            found: the calibration.
            off: the gates, as in ``GATES_OFF``.
            target: the goal.
        """
        if not off:
            return found
        changed = self._evaluate(found.choice, {"GATES_OFF": off})
        if target.max_ap_drop is not None and changed.drop > target.max_ap_drop:
            logger.info("All gates stay: without some, the exits lose more than the target allows")
            return found
        return changed

    def _evaluate(self, choice: Choice, extra: Setting | None = None) -> Calibration:
        """Evaluate a choice on the images that judge."""
        plain = {**self.plain[choice.place], **self._tiles[0][choice.tile]}
        setting = self.sequence.setting(choice.place, extra, tile=choice.tile)
        return Calibration(
            setting=setting,
            plain={**plain, **(extra or {})} if plain else plain,
            reported=self.sequence.evidence.trial(setting),
            full=self.others.full,
            differences=self.sequence.changes(choice, extra),
            choice=choice,
            metric=self.metric,
        )

    def with_scores(self, setting: Setting) -> Setting:
        """Add a score calibration, so that scores mean the same after every exit stage.

        Scores are mapped to those of the last stage, so that the score threshold keeps its
        meaning. The map is fitted to the search half of the images, and used only if it does not
        lower the AP there. Without a search half, nothing is fitted.
        """
        if self.trials is self.others:
            return setting
        trial = self.trials.replay(self.policy(setting))
        matched = trial.matched
        counts = ~matched.ignored[0]
        stages = matched.exit_stages[counts]
        if len(np.unique(stages)) < 2:
            return setting
        fitted = fit_score_maps(
            matched.scores[counts], matched.hits[0][counts], stages, self.num_stages
        )
        if fitted[-1] == UNCHANGED:  # the meaning of the last stage's scores is unknown
            return setting
        scales, shifts = zip(*to_last_stage(fitted), strict=True)
        mapped = {**setting, "SCORE_SCALES": scales, "SCORE_SHIFTS": shifts}
        after = self.trials.replay(self.policy(mapped)).metrics[self.metric]
        return mapped if after >= trial.metrics[self.metric] else setting

    def _evidence(self) -> Evidence:
        return Evidence(self.others, self.policy, metric=self.metric, seed=self._seed)

    def _front(self) -> list[Setting]:
        """The best of the search, by rising loss and falling work; the full cascade first."""
        tried, full = self.search.tried, self.search.full
        keys = [key for key in tried if key != full]
        losses = [loss_of(tried[key], tried[full], self.metric) for key in keys]
        front = pareto_front(losses, [tried[key].work for key in keys])
        ranks = np.linspace(0, len(front) - 1, min(len(front), MOST_PLACES)).round().astype(int)
        return [{}, *(self.search.setting(keys[front[rank]]) for rank in ranks)]


def split_images(
    image_ids: Sequence[int], matcher: ImageMatcher, seed: int
) -> tuple[list[int], list[int]]:
    """Indices of the images to choose on and of those to report on, ascending, drawn at random.

    Raises:
        DatasetError: one half of the images has no object.
    """
    order = np.random.default_rng(seed).permutation(len(image_ids)).tolist()
    middle = (len(order) + 1) // 2
    halves = sorted(order[:middle]), sorted(order[middle:])
    for half, purpose in zip(halves, ("search on", "judge exits by"), strict=True):
        if not any(len(matcher.objects_of(image_ids[index])[1]) for index in half):
            raise DatasetError(
                f"None of the {len(half)} images to {purpose} has an object. Use more images with "
                "objects, or another --seed, which decides the two halves."
            )
    return halves


def build_policy(cfg: CfgNode, setting: Setting, learned: LearnedParts | None) -> ExitPolicy:
    """The exits that a setting describes.

    Args:
        cfg: of the model.
        setting: values by keys of ``MODEL.CASCADE.EXIT``; keys that it does not name are off.
        learned: the model's learned parts.
    """
    arguments = config.exit_arguments(config.with_exits(cfg, setting))
    assert arguments is not None
    return ExitPolicy(**{**arguments, "learned": learned})

"""From a target to exits: record, search on one half of the images, report on the other."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.calibration.bootstrap import Difference
from cascade_det.calibration.image_matching import ImageMatcher
from cascade_det.calibration.latency_model import LatencyModel
from cascade_det.calibration.progress import progress_bar
from cascade_det.calibration.risk_control import fixed_sequence, pareto_front
from cascade_det.calibration.score_calibration import UNCHANGED, ScoreMap, fit_score_maps
from cascade_det.calibration.search import Levels, Search, Setting
from cascade_det.calibration.search_space import exit_parameters
from cascade_det.calibration.target import Target
from cascade_det.calibration.trials import ExitTrials, Recording, Trial
from cascade_det.core import ExitPolicy
from cascade_det.core.exits.learned import LearnedParts
from cascade_det.errors import ConfigError, DatasetError

logger = logging.getLogger(__name__)

# A drop of AP has to be below the target by this many standard deviations of its bootstrap.
MARGIN = 1.0


@dataclass(frozen=True)
class Calibration:
    """The result of a calibration.

    Attributes:
        setting: keys of ``MODEL.CASCADE.EXIT``; empty for the full cascade.
        plain: the same without the score calibration.
        reported: the trial of the setting on the held-out images.
        full: the full cascade on the same images.
        differences: of AP from the full cascade on these images, with their uncertainty.
        metric: the AP that counts, a key of ``differences``.
        rejected: the setting that was chosen first and loses more on these images than the target
            allows; the result is the full cascade then. ``None`` if none was rejected.
    """

    setting: Setting
    plain: Setting
    reported: Trial
    full: Trial
    differences: dict[str, Difference]
    metric: str = "AP"
    rejected: Calibration | None = None

    @property
    def drop(self) -> float:
        """Percent points of AP lost on the held-out images."""
        return -self.differences[self.metric].value


class Calibrator:
    """Finds exits for targets on a recording.

    Args:
        cfg: of the recorded model.
        recording: of the full cascade.
        matcher: of the ground truth.
        learned: the model's learned parts.
        score: lowest score of a detection that can be lost.
        seed: of the split into halves.
        metric: the AP that counts: ``AP`` or ``segm/AP``.
        loss: what can be lost: ``boxes`` or ``masks``.

    Attributes:
        trials: on the search half of the images.
        others: on the held-out images.
        search: everything that was tried.
        has_masks: whether the cascade has masks.

    Raises:
        DatasetError: one half of the images has no object.
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
        self.num_stages = recording.records[0].num_stages
        # A copy: records are on the CPU, the detector's own parts stay on its device.
        self.learned = None if learned is None else copy.deepcopy(learned).cpu().eval()
        choosing, reporting = split_images(recording.image_ids, matcher, seed)
        self.trials, self.others = (
            ExitTrials(recording.of_images(half), matcher, score=score, loss=loss)
            for half in (choosing, reporting)
        )
        records = self.trials.recording.records
        parameters = exit_parameters(
            num_stages=self.num_stages,
            objectness=torch.cat([torch.sigmoid(r.objectness) for r in records]).numpy(),
            proposals_per_image=self.trials.recording.most_proposals,
            learned=() if learned is None else learned.names,
        )
        self.search = Search(
            parameters,
            lambda setting: self.trials.replay(self.policy(setting)).summary(),
            metric=metric,
        )

    def policy(self, setting: Setting) -> ExitPolicy:
        """The exits of a setting, for trials."""
        return build_policy(self.cfg, setting, self.learned)

    def try_settings(self, most_trials: int) -> None:
        """Search, and show the progress."""
        with progress_bar("Trying settings", most_trials) as self.search.on_trial:
            self.search.search(most_trials)

    def calibrate(self, target: Target, latency: LatencyModel | None = None) -> Calibration:
        """The best of the tried settings for a target.

        If the setting loses more AP on the other half of the images than the target allows, the
        result is the full cascade. Apart from that, and from the tests for a ``risk``, the other
        half decides nothing.

        Args:
            target: the goal.
            latency: of the device; for a target in milliseconds.

        Raises:
            ConfigError: no setting reaches the target.
        """
        found = self._evaluate(self.search.setting(self._choose(target, latency)))
        if target.max_ap_drop is None or found.drop <= target.max_ap_drop:
            return found
        return replace(self._evaluate({}), rejected=found)

    def with_gates_off(self, found: Calibration, plain: Setting, target: Target) -> Calibration:
        """A calibration with further gates off, unless it then breaks its promise.

        Args:
            found: the calibration.
            plain: its plain setting with ``GATES_OFF``.
            target: the goal.
        """
        if plain == found.plain:
            return found
        changed = self._evaluate(plain)
        if target.max_ap_drop is not None and changed.drop > target.max_ap_drop:
            logger.info("All gates stay: without some, the exits lose more than the target allows")
            return found
        return changed

    def _evaluate(self, plain: Setting) -> Calibration:
        """Evaluate a setting on the held-out images."""
        setting = self.with_scores(plain)
        reported = self.others.replay(self.policy(setting))
        full = self.others.full
        differences = reported.differences(full)
        return Calibration(setting, plain, reported, full, differences, self.metric)

    def with_scores(self, setting: Setting) -> Setting:
        """Add a score calibration, so that scores mean the same after every exit stage.

        Scores are mapped to those of the last stage, so that the score threshold keeps its
        meaning. The map is fitted to the search half of the images, and used only if it does not
        lower the AP there.
        """
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

    def _choose(self, target: Target, latency: LatencyModel | None) -> Levels:
        tried = self.search.tried
        if target.risk is not None:
            return self._with_guarantee(target.risk, target.delta)
        if target.max_ap_drop is not None:
            return self._with_drop(target.max_ap_drop)
        if target.latency_ms is not None:
            assert latency is not None
            costs = {
                key: latency.per_image(trial.entered, trial.masks) for key, trial in tried.items()
            }
            reached = [key for key in tried if costs[key] <= target.latency_ms]
            limit = f"--latency-ms {target.latency_ms}: the fastest setting takes"
            fastest = f"{min(costs.values()):.1f} ms per image on this device"
        else:
            assert target.exit_rate is not None
            rates = {key: trial.exit_rate(self.trials.full) for key, trial in tried.items()}
            reached = [key for key in tried if rates[key] >= target.exit_rate]
            limit = f"--exit-rate {target.exit_rate}: the most that a setting skips is"
            fastest = f"{max(rates.values()):.3f} of the later stages' regions"
        if not reached:
            raise ConfigError(f"{limit} {fastest}. Give another target.")
        return max(reached, key=lambda key: (tried[key].metrics[self.metric], -tried[key].work))

    def _with_drop(self, most: float) -> Levels:
        """The least work whose drop of AP is below the target with a margin."""
        tried, full, metric = self.search.tried, self.trials.full, self.metric
        good = [p for p in tried if full.metrics[metric] - tried[p].metrics[metric] <= most]
        with progress_bar("Judging settings", len(good)) as step:
            for levels in sorted(good, key=lambda p: tried[p].work):
                trial = self.trials.replay(self.policy(self.search.setting(levels)))
                change = trial.difference(full, metric)
                if -change.value + MARGIN * change.deviation <= most:
                    return levels
                step()
        return self.search.full

    def _with_guarantee(self, risk: float, delta: float) -> Levels:
        """Pareto testing: one half proposes settings from safe to risky, the other tests them.

        Settings are tested with their score calibration, since scores decide what is found.
        """
        tried, full = self.search.tried, self.search.full
        keys = [full, *(key for key in tried if key != full)]
        risks = np.array([tried[key].lost.mean() for key in keys])
        front = [keys[i] for i in pareto_front(risks, [tried[key].work for key in keys])]
        sequence = [full, *(key for key in front if key != full)]
        settings = (self.with_scores(self.search.setting(levels)) for levels in sequence)
        losses = (self.others.replay(self.policy(setting)).lost for setting in settings)
        return sequence[fixed_sequence(losses, risk, delta)]


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
    for half, purpose in zip(halves, ("choose exits on", "judge them by"), strict=True):
        if not any(len(matcher.objects_of(image_ids[index])[1]) for index in half):
            raise DatasetError(
                f"None of the {len(half)} images to {purpose} has an object. Use more images with "
                "objects, or another --seed, which decides the two halves."
            )
    return halves


def to_last_stage(fitted: Sequence[ScoreMap]) -> list[ScoreMap]:
    """The maps to scores of the last stage that follow from maps to probabilities.

    Stages with too few detections to be fitted keep their scores.
    """
    last = fitted[-1]
    return [
        one
        if one == UNCHANGED
        else ScoreMap(one.scale / last.scale, (one.shift - last.shift) / last.scale)
        for one in fitted
    ]


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

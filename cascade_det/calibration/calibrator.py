"""From a target to exits: record, search on one half of the images, report on the other."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.calibration.bootstrap import Difference, paired_bootstrap
from cascade_det.calibration.image_matching import ImageMatcher
from cascade_det.calibration.latency_model import LatencyModel
from cascade_det.calibration.progress import Progress
from cascade_det.calibration.risk_bounds import hoeffding_bentkus_p_value
from cascade_det.calibration.risk_control import fixed_sequence, pareto_front
from cascade_det.calibration.score_calibration import ScoreCalibration, fit_score_calibration
from cascade_det.calibration.search import Search, Setting, exit_parameters
from cascade_det.calibration.target import Target
from cascade_det.calibration.trials import ExitTrials, Outcome, Recording, Trial
from cascade_det.core import ExitPolicy
from cascade_det.core.exits.learned import LearnedParts
from cascade_det.errors import ConfigError, DatasetError

Places = tuple[int, ...]

# A drop of AP has to be below the target by so many standard deviations of its bootstrap.
MARGIN = 1.0
BOOTSTRAP_ROUNDS = 300
_AS_IT_IS = (1.0, 0.0)


@dataclass(frozen=True)
class Calibration:
    """The outcome.

    Attributes:
        setting: keys of ``MODEL.CASCADE.EXIT``; empty for the full cascade.
        plain: the same without the map of the scores.
        reported: the trial of the setting on the images that it was not chosen on.
        full: the full cascade on these.
        differences: of AP to the full cascade on these, with their uncertainty.
        rejected: what was chosen first, and loses more on these than the target allows; the full
            cascade is the outcome then. ``None`` where nothing was rejected.
    """

    setting: Setting
    plain: Setting
    reported: Trial
    full: Trial
    differences: dict[str, Difference]
    rejected: Calibration | None = None

    @property
    def drop(self) -> float:
        """Percent points of AP that are lost on the images that it was not chosen on."""
        return -self.differences["AP"].value


class Calibrator:
    """Finds exits for targets on a recording.

    Args:
        cfg: of the model that was recorded.
        recording: of the full cascade.
        matcher: of the ground truth.
        learned: the model's learned parts.
        score: of the detections whose loss is looked at.
        seed: of the split in halves.

    Attributes:
        trials: on the images that settings are chosen on.
        others: on the rest.
        search: all that was tried.

    Raises:
        DatasetError: in one half of the images there is no object.
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
    ) -> None:
        self.cfg = cfg
        self.num_stages = recording.records[0].num_stages
        # The detector keeps its own where it is: records are on the CPU.
        self.learned = None if learned is None else copy.deepcopy(learned).cpu().eval()
        choosing, reporting = split_images(recording.image_ids, matcher, seed)
        self.trials = ExitTrials(recording.of_images(choosing), matcher, score=score)
        self.others = ExitTrials(recording.of_images(reporting), matcher, score=score)
        records = self.trials.recording.records
        self.search = Search(
            exit_parameters(
                num_stages=self.num_stages,
                objectness=torch.cat([torch.sigmoid(r.objectness) for r in records]).numpy(),
                proposals_per_image=self.trials.recording.most_proposals,
                learned=() if learned is None else learned.names,
            ),
            lambda setting: self.trials.run(self.policy(setting)).outcome(),
        )

    def policy(self, setting: Setting) -> ExitPolicy:
        """The exits of a setting, for trials."""
        return build_policy(self.cfg, setting, self.learned)

    def try_settings(self, most_trials: int) -> None:
        """Search, and show how far it is."""
        with Progress("Trying settings", most_trials) as work:
            self.search.on_trial = work.step
            self.search.search(most_trials)

    def calibrate(self, target: Target, latency: LatencyModel | None = None) -> Calibration:
        """The best setting for a target, of those that were tried.

        A drop of AP has to be kept on the images that the setting was not chosen on as well: else
        the full cascade is what is left. Nothing else is decided on them, but for ``--risk``.

        Args:
            target: what is wanted.
            latency: of the device; for a target in milliseconds.

        Raises:
            ConfigError: no setting reaches it.
            SampleTooSmallError: too few images for the guarantee.
        """
        found = self._judged(self.search.setting(self._choose(target, latency)))
        if target.max_ap_drop is None or found.drop <= target.max_ap_drop:
            return found
        return replace(self._judged({}), rejected=found)

    def _judged(self, plain: Setting) -> Calibration:
        """What a setting does on the images that it was not chosen on."""
        setting = self.with_scores(plain)
        reported = self.others.run(self.policy(setting))
        differences = paired_bootstrap(
            self.others.full.matched, reported.matched, rounds=BOOTSTRAP_ROUNDS
        )
        return Calibration(setting, plain, reported, self.others.full, differences)

    def with_scores(self, setting: Setting) -> Setting:
        """The setting, with scores that mean the same whatever stage a region left after.

        They are mapped to those of the last stage, so that the score threshold keeps its meaning.
        The map is fitted to the images that settings are chosen on, and taken only where it does
        not lower the AP on them.
        """
        trial = self.trials.run(self.policy(setting))
        matched = trial.matched
        counts = ~matched.ignored[0]
        stages = matched.exit_stages[counts]
        if len(np.unique(stages)) < 2:
            return setting
        fitted = fit_score_calibration(
            matched.scores[counts], matched.hits[0][counts], stages, self.num_stages
        )
        maps = to_last_stage(fitted)
        if maps is None:
            return setting
        mapped = {**setting, "SCORE_SCALES": maps.scales, "SCORE_SHIFTS": maps.shifts}
        better = self.trials.run(self.policy(mapped)).figures["AP"] >= trial.figures["AP"]
        return mapped if better else setting

    def _choose(self, target: Target, latency: LatencyModel | None) -> Places:
        tried = self.search.tried
        if target.risk is not None:
            return self._with_guarantee(target.risk, target.delta)
        if target.max_ap_drop is not None:
            return self._with_drop(target.max_ap_drop)
        if target.latency_ms is not None:
            assert latency is not None
            costs = {p: latency.per_image(t.entered) for p, t in tried.items()}
            wanted = [p for p in tried if costs[p] <= target.latency_ms]
            limit = f"--latency-ms {target.latency_ms}: the fastest setting takes"
            fastest = f"{min(costs.values()):.1f} ms per image on this device"
        else:
            assert target.exit_rate is not None
            rates = {p: self.exit_rate(t, self.trials.full) for p, t in tried.items()}
            wanted = [p for p in tried if rates[p] >= target.exit_rate]
            limit = f"--exit-rate {target.exit_rate}: the most that a setting skips is"
            fastest = f"{max(rates.values()):.3f} of the later stages' regions"
        if not wanted:
            raise ConfigError(f"{limit} {fastest}. Give another target.")
        return max(wanted, key=lambda p: (tried[p].figures["AP"], -tried[p].work))

    @staticmethod
    def exit_rate(outcome: Outcome, full: Outcome) -> float:
        """Share of the later stages' regions that are not computed."""
        return 1 - outcome.later_work / max(full.later_work, 1)

    @property
    def _everything(self) -> Places:
        """The full cascade."""
        return (0,) * len(self.search.knobs)

    def _with_drop(self, most: float) -> Places:
        tried, full = self.search.tried, self.trials.full
        good = [p for p in tried if full.figures["AP"] - tried[p].figures["AP"] <= most]
        with Progress("Judging settings", len(good)) as work:
            for places in sorted(good, key=lambda p: tried[p].work):
                trial = self.trials.run(self.policy(self.search.setting(places)))
                change = paired_bootstrap(full.matched, trial.matched, rounds=BOOTSTRAP_ROUNDS)
                if -change["AP"].value + MARGIN * change["AP"].deviation <= most:
                    return places
                work.step()
        return self._everything

    def _with_guarantee(self, risk: float, delta: float) -> Places:
        """Pareto testing: one half proposes settings from safe to risky, the other tests them.

        Fixed-sequence testing stops at the first setting that fails, so that the riskier ones need
        not be run. What is tested has its map of the scores already: they decide what is found.
        """
        tried = self.search.tried
        keys = [self._everything, *(key for key in tried if key != self._everything)]
        risks = np.array([tried[key].lost.mean() for key in keys])
        front = [keys[i] for i in pareto_front(risks, [tried[key].work for key in keys])]
        sequence = [self._everything, *(key for key in front if key != self._everything)]
        losses: list[npt.NDArray[np.float64]] = []
        for key in sequence:
            setting = self.with_scores(self.search.setting(key))
            losses.append(self.others.run(self.policy(setting)).lost)
            if hoeffding_bentkus_p_value(losses[-1][None], risk)[0] > delta:
                break
        return sequence[fixed_sequence(np.array(losses), risk, delta)]


def split_images(
    image_ids: Sequence[int], matcher: ImageMatcher, seed: int
) -> tuple[list[int], list[int]]:
    """Places of the images to choose on and of those to report on, in rising order, at random.

    Raises:
        DatasetError: in one half of the images there is no object.
    """
    order = np.random.default_rng(seed).permutation(len(image_ids)).tolist()
    middle = (len(order) + 1) // 2
    halves = sorted(order[:middle]), sorted(order[middle:])
    for places, purpose in zip(halves, ("choose exits on", "judge them by"), strict=True):
        if not any(len(matcher.objects_of(image_ids[place])[1]) for place in places):
            raise DatasetError(
                f"None of the {len(places)} images to {purpose} has an object: more images with "
                "objects are needed, or another --seed, which the two halves are drawn by."
            )
    return halves


def to_last_stage(fitted: ScoreCalibration) -> ScoreCalibration | None:
    """The map to the scores of the last stage, where ``fitted`` maps to probabilities.

    Stages with too few detections to be fitted keep their scores; if the last one is among them,
    nobody knows what its scores mean, and there is no map.
    """
    *_, (last_scale, last_shift) = pairs = list(zip(fitted.scales, fitted.shifts, strict=True))
    if pairs[-1] == _AS_IT_IS:
        return None
    maps = [
        pair if pair == _AS_IT_IS else (pair[0] / last_scale, (pair[1] - last_shift) / last_scale)
        for pair in pairs
    ]
    return ScoreCalibration(tuple(a for a, _ in maps), tuple(b for _, b in maps))


def build_policy(cfg: CfgNode, setting: Setting, learned: LearnedParts | None) -> ExitPolicy:
    """The exits that a setting describes.

    Args:
        cfg: of the model.
        setting: values by keys of ``MODEL.CASCADE.EXIT``; what it does not name is off.
        learned: the model's learned parts.
    """
    arguments = config.exit_arguments(config.with_exits(cfg, setting))
    assert arguments is not None
    return ExitPolicy(**{**arguments, "learned": learned})

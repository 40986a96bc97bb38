"""From a target to exits: record, search on one half of the images, report on the other."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from fvcore.common.config import CfgNode
from tqdm import tqdm

from cascade_det import config
from cascade_det.core import ExitPolicy
from cascade_det.core.exits.learned import LearnedParts
from cascade_det.errors import ConfigError
from cascade_det.evaluation.bootstrap import Difference, paired_bootstrap
from cascade_det.evaluation.exit_search import Search, Setting, exit_knobs
from cascade_det.evaluation.exit_trials import ExitTrials, Recording, Trial
from cascade_det.evaluation.image_matching import ImageMatcher
from cascade_det.evaluation.latency_model import LatencyModel
from cascade_det.evaluation.risk_bounds import hoeffding_bentkus_p_value
from cascade_det.evaluation.risk_control import (
    SampleTooSmallError,
    fixed_sequence,
    pareto_front,
    smallest_sample,
)
from cascade_det.evaluation.score_calibration import fit_score_calibration

logger = logging.getLogger(__name__)

# A drop of AP has to be below the target by so many standard deviations of its bootstrap.
MARGIN = 1.0
BOOTSTRAP_ROUNDS = 300


@dataclass(frozen=True)
class Target:
    """What is wanted; one of the first four.

    Attributes:
        max_ap_drop: percent points of AP below the full cascade; the least work is looked for.
        latency_ms: milliseconds per image; the highest AP is looked for.
        exit_rate: share of the later stages' regions that are not computed, 0 to 1; likewise.
        risk: bound on the mean share of the full cascade's true positives of an image that get
            lost; the least work is looked for, and kept with a probability of ``1 - delta``.
        delta: see ``risk``.
    """

    max_ap_drop: float | None = None
    latency_ms: float | None = None
    exit_rate: float | None = None
    risk: float | None = None
    delta: float = 0.1

    def check(self) -> None:
        """Tell in advance what has no meaning.

        Raises:
            ConfigError: not one target, or one that is out of range.
        """
        names = ("max_ap_drop", "latency_ms", "exit_rate", "risk")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"{len(given)} targets are given: give one of --max-ap-drop, --latency-ms, "
                "--exit-rate and --risk"
            )
        value = getattr(self, given[0])
        most = 1.0 if given[0] in ("exit_rate", "risk") else float("inf")
        if not 0 <= value <= most or (given[0] == "risk" and value == 0):
            option = "--" + given[0].replace("_", "-")
            raise ConfigError(f"{option} is {value}: give a number from 0 to {most}")
        if not 0 < self.delta < 1:
            raise ConfigError(f"--delta is {self.delta}: give a number between 0 and 1")

    def check_images(self, num_images: int) -> None:
        """Tell in advance whether there are enough images for a guarantee; half of them test it.

        Raises:
            SampleTooSmallError: there are not.
        """
        if self.risk is None:
            return
        least = smallest_sample(self.risk, self.delta)
        if num_images // 2 < least:
            raise SampleTooSmallError(
                f"--risk {self.risk} --delta {self.delta}: at least {least} images are needed to "
                f"test a setting and as many to choose it, {2 * least} in all, but there are "
                f"{num_images}. Add images, or raise --risk or --delta."
            )


@dataclass(frozen=True)
class Calibration:
    """The outcome.

    Attributes:
        setting: keys of ``MODEL.CASCADE.EXIT``; empty for the full cascade.
        search: all that was tried.
        chosen: the trial of the setting on the images that it was chosen on.
        reported: the same on the other images.
        full: the full cascade on these.
        differences: of AP to the full cascade on these, with their uncertainty.
        choosing: places of the images that settings were chosen on.
        reporting: places of the others.
    """

    setting: Setting
    search: Search
    chosen: Trial
    reported: Trial
    full: Trial
    differences: dict[str, Difference]
    choosing: list[int]
    reporting: list[int]


class Calibrator:
    """Finds exits for targets on a recording.

    Args:
        cfg: of the model that was recorded.
        recording: of the full cascade.
        matcher: of the ground truth.
        learned: the model's learned parts.
        score: of the detections whose loss is looked at.
        seed: of the split in halves.
        most_trials: settings to try.
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
        most_trials: int = 1000,
    ) -> None:
        self.cfg = cfg
        self.learned = learned
        self.num_stages = recording.records[0].num_stages
        order = np.random.default_rng(seed).permutation(len(recording.image_ids))
        middle = (len(order) + 1) // 2
        self.choosing = sorted(order[:middle].tolist())
        self.reporting = sorted(order[middle:].tolist())
        self.trials = ExitTrials(recording.of_images(self.choosing), matcher, score=score)
        self.others = ExitTrials(recording.of_images(self.reporting), matcher, score=score)
        self.search = self._searched(most_trials)

    def policy(self, setting: Setting) -> ExitPolicy:
        """The exits of a setting."""
        return build_policy(self.cfg, setting, self.learned)

    def calibrate(self, target: Target, latency: LatencyModel | None = None) -> Calibration:
        """The best setting for a target.

        Raises:
            ConfigError: no setting is fast enough.
            SampleTooSmallError: too few images for the guarantee.
        """
        places = self._choose(target, latency)
        setting = self.search.setting(places)
        reported = self.others.run(self.policy(setting))
        differences = paired_bootstrap(
            self.others.full.matched, reported.matched, rounds=BOOTSTRAP_ROUNDS
        )
        return Calibration(
            setting,
            self.search,
            self.search.trial(places),
            reported,
            self.others.full,
            differences,
            self.choosing,
            self.reporting,
        )

    def _searched(self, most_trials: int) -> Search:
        records = self.trials.recording.records
        objectness = torch.cat([torch.sigmoid(record.objectness) for record in records]).numpy()
        knobs = exit_knobs(
            num_stages=records[0].num_stages,
            objectness=objectness,
            proposals_per_image=self.trials.recording.most_proposals,
            learned=() if self.learned is None else self.learned.names,
        )
        progress = tqdm(desc="trials", unit="setting", disable=None, leave=False)
        search = Search(
            knobs,
            lambda setting: self.trials.run(self.policy(setting)),
            on_trial=lambda: progress.update() and None,
        )
        search.search(most_trials)
        progress.close()
        return search

    def _choose(self, target: Target, latency: LatencyModel | None) -> tuple[int, ...]:
        tried = self.search.tried
        if target.risk is not None:
            return self._with_guarantee(target.risk, target.delta)
        if target.max_ap_drop is not None:
            for places in sorted(tried, key=lambda p: tried[p].work):
                if self._drop_is_below(tried[places], target.max_ap_drop):
                    return places
            return (0,) * len(self.search.knobs)
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
        return max(wanted, key=lambda p: (tried[p].figures()["AP"], -tried[p].work))

    @staticmethod
    def exit_rate(trial: Trial, full: Trial) -> float:
        """Share of the later stages' regions that are not computed."""
        return 1 - trial.later_work / max(full.later_work, 1)

    def _drop_is_below(self, trial: Trial, most: float) -> bool:
        full = self.trials.full
        if full.figures()["AP"] - trial.figures()["AP"] > most:
            return False
        difference = paired_bootstrap(full.matched, trial.matched, rounds=BOOTSTRAP_ROUNDS)["AP"]
        return -difference.value + MARGIN * difference.deviation <= most

    def _with_guarantee(self, risk: float, delta: float) -> tuple[int, ...]:
        """Pareto testing: one half proposes settings from safe to risky, the other tests them.

        Fixed-sequence testing may stop at the first setting that fails, so that the riskier ones
        need not be run.
        """
        tried = self.search.tried
        everything = (0,) * len(self.search.knobs)
        keys = [everything, *(key for key in tried if key != everything)]
        risks = np.array([tried[key].lost.mean() for key in keys])
        front = [keys[i] for i in pareto_front(risks, [tried[key].work for key in keys])]
        sequence = [everything, *(key for key in front if key != everything)]
        losses: list[npt.NDArray[np.float64]] = []
        for key in sequence:
            losses.append(self.others.run(self.policy(self.search.setting(key))).lost)
            if hoeffding_bentkus_p_value(losses[-1][None], risk)[0] > delta:
                break
        return sequence[fixed_sequence(np.array(losses), risk, delta)]


def with_scores(calibrator: Calibrator, calibration: Calibration) -> Setting:
    """The setting, with scores that mean the same whatever stage a region left after.

    They are mapped to those of the last stage, so that the score threshold keeps its meaning. The
    map is taken only where it does not lower the AP on the images that it was fitted to.
    """
    matched, setting = calibration.chosen.matched, calibration.setting
    counts = ~matched.ignored[0]
    stages = matched.exit_stages[counts]
    if len(np.unique(stages)) < 2:
        return setting
    fitted = fit_score_calibration(
        matched.scores[counts], matched.hits[0][counts], stages, calibrator.num_stages
    )
    last_scale, last_shift = fitted.scales[-1], fitted.shifts[-1]
    mapped = {
        **setting,
        "SCORE_SCALES": tuple(scale / last_scale for scale in fitted.scales),
        "SCORE_SHIFTS": tuple((shift - last_shift) / last_scale for shift in fitted.shifts),
    }
    trial = calibrator.trials.run(calibrator.policy(mapped))
    better = trial.figures()["AP"] >= calibration.chosen.figures()["AP"]
    return mapped if better else setting


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

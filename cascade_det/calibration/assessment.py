"""Measures exits on the images that judge them, and times them on the device."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from cascade_det.calibration.calibrator import Calibration, Calibrator, build_policy
from cascade_det.calibration.choose import time_by
from cascade_det.calibration.comparison import (
    FULL,
    ComparedExits,
    baselines,
    compare,
    simple_baselines,
)
from cascade_det.calibration.front import FrontPoint, choose_points, front_point
from cascade_det.calibration.gate_costs import GATES_OFF, without_costly_gates
from cascade_det.calibration.image_matching import MatchedDetections
from cascade_det.calibration.latency_model import LatencyModel
from cascade_det.calibration.mask_rules import MaskRulesRow, try_mask_rules
from cascade_det.calibration.profiles import PROMISES
from cascade_det.calibration.recording import time_policies
from cascade_det.calibration.score_calibration import expected_calibration_error
from cascade_det.calibration.search import Setting
from cascade_det.calibration.search_space import TILE_THRESHOLD, usual_settings
from cascade_det.calibration.target import FAST_DROP, QUALITY_DROP, Options
from cascade_det.calibration.trials import TrialSummary
from cascade_det.core import ExitPolicy
from cascade_det.data.samples import Batch
from cascade_det.engine.detector import CascadeDetector
from cascade_det.evaluation.agreement import agreement_loss
from cascade_det.evaluation.mean_bounds import mean_upper_bound

CHOSEN = "chosen"
# Probability that a promised loss is too low because the calibration images were easy.
PROMISE_DELTA = 0.025

_PARTS = {
    "pruning alone": ("PRUNE_THRESHOLDS",),
    "learned pruner alone": ("PRUNER_THRESHOLDS",),
    "redundancy alone": ("REDUNDANCY_IOU",),
    "objectness alone": ("PROPOSAL_THRESHOLD",),
    "fewer proposals alone": ("REGION_BUDGET",),
    "tile gate alone": (TILE_THRESHOLD,),
    "acceptance alone": ("CONFIDENCE", "THRESHOLDS", "LOCALISATION", "LOCALISATION_THRESHOLDS"),
}


@dataclass(frozen=True)
class Assessment:
    """Measures a detector and its exits.

    Attributes:
        calibrator: after its search.
        calibration: its result.
        latency: of the device.
        detector: that was recorded.
        batches: to measure milliseconds on, of equal size.
        options: how thorough.
    """

    calibrator: Calibrator
    calibration: Calibration
    latency: LatencyModel
    detector: CascadeDetector
    batches: Sequence[Batch]
    options: Options

    def expected(self) -> dict[str, float]:
        """Metrics of the setting on the images that judge; changes of AP are cross-fitted."""
        calibration = self.calibration
        reported, full = calibration.reported, calibration.full
        plain = self.calibrator.others.replay(self.calibrator.policy(calibration.plain))
        loss, deviation = self.loss(calibration.setting)
        aps: dict[str, float] = {}
        for name in ("AP", "segm/AP"):
            if change := calibration.differences.get(name):
                aps |= {
                    name: reported.metrics[name],
                    f"{name}_change": change.value,
                    f"{name}_change_low": change.low,
                    f"{name}_change_high": change.high,
                }
        if self.calibrator.has_masks:
            aps["masks_per_image"] = float(reported.masks.mean())
        if self.calibrator.has_tile_gate:
            tiles, of_all = reported.tiles, full.tiles.sum(axis=0)
            computed = np.minimum(tiles.sum(axis=0), of_all)  # open ones again in a whole map
            aps["tiles_open"] = float(tiles[:2].sum() / of_all.sum())
            aps["tiles_computed"] = float(computed.sum() / of_all.sum())
        return {
            **aps,
            "exit_rate": reported.exit_rate(full),
            "regions_left": reported.regions_left(full),
            "work": reported.work,
            "loss": loss,
            "loss_deviation": deviation,
            "lost_true_positives": float(reported.lost.mean()),
            "calibration_error_before": _calibration_error(plain.matched),
            "calibration_error": _calibration_error(reported.matched),
        }

    def loss(self, setting: Setting) -> tuple[float, float]:
        """Mean agreement loss on the images that judge, and its deviation."""
        # The full cascade reports its scores by the same calibration, as in shadow runs.
        scores: Setting = {key: x for key, x in setting.items() if key.startswith("SCORE_")}
        early, full = (
            self.calibrator.others.detections(self.calibrator.policy(one))
            for one in (setting, scores)
        )
        losses = np.array(
            [
                agreement_loss(of_exits, of_full, min_score=self.options.score)
                for of_exits, of_full in zip(early, full, strict=True)
            ]
        )
        mean, deviation = float(losses.mean()), float(losses.std(ddof=1) / np.sqrt(len(losses)))
        # Where hardly any image lost anything, the sample deviation is too small. Monitoring allows
        # two deviations, so a bound that holds for any distribution counts as two.
        return mean, max(deviation, (mean_upper_bound(losses, PROMISE_DELTA) - mean) / 2)

    def settings(self) -> dict[str, Setting]:
        """The setting, each of its parts alone, and each rule alone, by name."""
        learned, calibration = self.calibrator.learned, self.calibration
        return {
            CHOSEN: calibration.setting,
            **_parts(calibration.plain),
            **usual_settings(
                self.calibrator.num_stages,
                () if learned is None else learned.names,
                tile_gate=self.calibrator.has_tile_gate,
            ),
        }

    def milliseconds(self, points: Sequence[Setting]) -> tuple[dict[str, float], dict[str, float]]:
        """Milliseconds per image: of settings by ``setting_name``, of the comparison by name.

        All are measured in one run, in turn, so that they can be compared.

        Returns:
            All of them, and the part of the mask heads.
        """
        settings = {
            **self.settings(),
            **{setting_name(setting): setting for setting in points},
        }
        most_proposals = self.calibrator.trials.recording.most_proposals
        timings = time_policies(
            self.detector,
            self.batches,
            {
                FULL: None,
                **{name: self._policy_on_device(one) for name, one in settings.items()},
                **simple_baselines(self.calibrator.num_stages, most_proposals),
            },
            rounds=self.options.rounds,
        )
        size = len(self.batches[0])
        return (
            {n: median(c.milliseconds for c in calls) / size for n, calls in timings.items()},
            {n: median(c.mask_milliseconds for c in calls) / size for n, calls in timings.items()},
        )

    def comparison(
        self, milliseconds: Mapping[str, float], of_masks: Mapping[str, float]
    ) -> list[ComparedExits]:
        """The settings and the baselines, see ``baselines``.

        What was chosen has its cross-fitted changes.
        """
        others, chosen = self.calibrator.others, self.calibration
        policies = {name: self.calibrator.policy(one) for name, one in self.settings().items()}
        every = {**policies, **baselines(others, chosen.reported)}
        return [
            replace(row, differences=chosen.differences) if row.name == CHOSEN else row
            for row in compare(others, every, milliseconds, of_masks)
        ]

    def tried(self) -> list[FrontPoint]:
        """All trials, on the images that they were tried on."""
        search, trials = self.calibrator.search, self.calibrator.trials
        return [
            self._point(search.setting(levels), trial, trials.full)
            for levels, trial in search.tried.items()
        ]

    def front(self) -> list[FrontPoint]:
        """The settings to choose from, safe to risky, on the images that judge.

        What was chosen comes last if it is none of them, but has a tile gate.
        """
        settings = list(self.calibrator.sequence.settings)
        chosen = _all_gates(self.calibration.setting)
        return [self.judged(one) for one in (*settings, *([chosen] * (chosen not in settings)))]

    def profiles(self, front: Sequence[FrontPoint]) -> dict[str, Setting]:
        """Settings of the front by name, without gates that cost time."""
        sequence = self.calibrator.sequence
        quality, fast = (sequence.within(drop).place for drop in (QUALITY_DROP, FAST_DROP))
        settings = {
            name: point.setting for name, point in choose_points(front, quality, fast).items()
        }
        if self.calibrator.has_tile_gate and self.latency.per_tile:
            settings = {name: self._with_tiles(name, x) for name, x in settings.items()}
        # The chosen setting was timed before; two names may have the same setting.
        chosen = self.calibration.setting
        timed = {setting_name(_all_gates(chosen)): chosen, setting_name({}): {}}
        new: dict[str, Setting] = {}
        for name, setting in settings.items():
            if setting_name(setting) not in {*timed, *map(setting_name, new.values())}:
                new[name] = setting
        changed = without_costly_gates(
            self.calibrator,
            new,
            self.detector,
            self.batches,
            self.latency,
            rounds=self.options.rounds,
        )
        timed |= {setting_name(setting): changed[name] for name, setting in new.items()}
        return {name: timed[setting_name(setting)] for name, setting in settings.items()}

    def _with_tiles(self, name: str, setting: Setting) -> Setting:
        """A setting of the sequence with the tile gate that its profile allows."""
        sequence = self.calibrator.sequence
        if setting not in sequence.settings:
            return setting
        place = sequence.settings.index(setting)
        costs = time_by(self.latency, sequence.evidence)
        found = sequence.within_tiles(sequence.always(place), PROMISES[name], costs)
        return sequence.setting(place, tile=found.tile)

    def judged(
        self, setting: Setting, milliseconds: Mapping[str, float] | None = None
    ) -> FrontPoint:
        """A setting on the images that judge.

        Args:
            setting: of the sequence, or with further keys.
            milliseconds: measured, by ``setting_name``.
        """
        evidence = self.calibrator.sequence.evidence
        point = self._point(setting, evidence.trial(setting), evidence.full)
        return replace(point, milliseconds=(milliseconds or {}).get(setting_name(setting)))

    def _point(self, setting: Setting, trial: TrialSummary, full: TrialSummary) -> FrontPoint:
        return front_point(
            setting,
            trial,
            full,
            self.latency,
            chosen=setting == _all_gates(self.calibration.setting),
            metric=self.calibrator.metric,
            has_masks=self.calibrator.has_masks,
        )

    def mask_rules(self) -> list[MaskRulesRow]:
        """What rules of masks leave out with the chosen exits, see ``try_mask_rules``."""
        policy = self.calibrator.policy(self.calibration.setting)
        return try_mask_rules(self.calibrator.others, policy, self.latency)

    def _policy_on_device(self, setting: Setting) -> ExitPolicy:
        """The exits of a setting for the detector itself."""
        own = self.detector.cascade.exits
        return build_policy(self.calibrator.cfg, setting, None if own is None else own.learned)


def _all_gates(setting: Setting) -> Setting:
    return {key: value for key, value in setting.items() if key != GATES_OFF}


def setting_name(setting: Setting) -> str:
    """A name for a setting that no other policy has."""
    return f"setting {json.dumps(setting, sort_keys=True)}"


def _calibration_error(matched: MatchedDetections) -> float:
    counts = ~matched.ignored[0]
    return expected_calibration_error(matched.scores[counts], matched.hits[0][counts])


def _parts(setting: Setting) -> dict[str, Setting]:
    """The keys of a setting that belong together, each group alone."""
    parts = {
        name: {key: setting[key] for key in keys if key in setting} for name, keys in _PARTS.items()
    }
    return {name: part for name, part in parts.items() if part and part != setting}

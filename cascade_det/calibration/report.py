"""What a calibration of exits writes: YAML, table and plot, with measured milliseconds."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from cascade_det.calibration.calibrator import Calibration, Calibrator, build_policy
from cascade_det.calibration.comparison import (
    FULL,
    PROPOSALS,
    ComparedExits,
    compare,
    format_comparison,
    write_comparison,
)
from cascade_det.calibration.files import write_exits
from cascade_det.calibration.front import (
    FrontPoint,
    choose_points,
    front_point,
    plot_front,
    spread_out,
    write_front,
)
from cascade_det.calibration.image_matching import MatchedDetections
from cascade_det.calibration.latency_model import LatencyModel
from cascade_det.calibration.profiles import PROMISES, Profiles
from cascade_det.calibration.progress import Progress
from cascade_det.calibration.provenance import Provenance
from cascade_det.calibration.recording import time_policies, truncated_cascades
from cascade_det.calibration.risk_bounds import wsr_ucb
from cascade_det.calibration.score_calibration import expected_calibration_error
from cascade_det.calibration.search import Setting, pareto, usual_settings
from cascade_det.calibration.target import Options, Target
from cascade_det.core import ExitPolicy
from cascade_det.evaluation.agreement import agreement_loss
from cascade_det.files import write_json
from cascade_det.report.text import describe_machine

logger = logging.getLogger(__name__)

CHOSEN, REJECTED = "chosen", "rejected"
# A promise of the loss is broken by a sample of calibration images that looked too well.
PROMISE_DELTA = 0.025
# Points of the front that are measured, beside the profiles.
MOST_MEASURED = 8
# What a calibration leaves in its folder.
FILES = (
    *("exits.yaml", *(f"{name}.yaml" for name in PROMISES), "front.csv", "front.png"),
    *("comparison.csv", "calibration.json"),
)


class CalibrationReport:
    """Measures a detector, and tells what exits do.

    Args:
        calibrator: that has tried its settings.
        detector: that was recorded.
        batches: to measure milliseconds on, of equal size.
        options: how thorough.
    """

    def __init__(
        self, calibrator: Calibrator, detector: Any, batches: Sequence[Any], options: Options
    ) -> None:
        self.calibrator = calibrator
        self.detector = detector
        self.batches = batches
        self.options = options
        self.device = next(detector.parameters()).device

    def write(
        self,
        calibration: Calibration,
        target: Target,
        latency: LatencyModel,
        source: Provenance,
        output_dir: Path,
    ) -> dict[str, Any]:
        """Compare, tell and write ``FILES``, of the profiles those that keep their promise."""
        expected = self.expected(calibration)
        tried, front = self.front(calibration, latency)
        named = {
            name: replace(point, setting=self.calibrator.with_scores(point.setting))
            for name, point in choose_points(front)._asdict().items()
        }
        drawn = [*named.values(), *spread_out(front, MOST_MEASURED)]
        milliseconds = self.measured(calibration, drawn)
        rows = self.compared(calibration, milliseconds)
        logger.info("On the other half of the images:\n\n%s\n", format_comparison(rows))
        on_others = {
            name: self.on_others(point, latency, milliseconds) for name, point in named.items()
        }
        again = [self.on_others(point, latency, milliseconds) for point in front]
        profiles = Profiles.of(on_others, calibration.setting)
        write = partial(self._write_exits, source=source, output_dir=output_dir)
        device = "" if target.latency_ms is None else latency.device_name
        write("exits", calibration.setting, device=device)
        for name, point in profiles.written.items():
            write(name, point.setting)
        write_front(again, output_dir / "front.csv")
        write_comparison(rows, output_dir / "comparison.csv")
        plot_front(
            again,
            output_dir / "front.png",
            profiles=profiles.written,
            tried=tried,
            # Where a setting was rejected, the chosen one is the full cascade.
            compared=[r for r in rows if calibration.rejected is None or r.name != CHOSEN],
            chosen=(CHOSEN, REJECTED),
        )
        self._warn(calibration, target, rows)
        for name, reason in profiles.left_out.items():
            logger.info("No %s.yaml: %s", name, reason)
        content = {
            "target": {name: x for name, x in asdict(target).items() if x is not None},
            "setting": calibration.setting,
            "expected": expected,
            "images": {
                "chosen_on": len(self.calibrator.trials.recording.image_ids),
                "reported_on": len(self.calibrator.others.recording.image_ids),
            },
            "profiles": {"written": [*profiles.written], "left_out": profiles.left_out},
            "trials": len(self.calibrator.search.tried),
            "latency_model": latency.as_dict(),
            "machine": describe_machine(self.device, self.detector.dtype),
            **source.as_dict(),
        }
        write_json(content, output_dir / "calibration.json")
        return content

    @staticmethod
    def _warn(calibration: Calibration, target: Target, rows: Sequence[ComparedExits]) -> None:
        """Say where the outcome is not what was asked for."""
        if calibration.rejected is not None:
            change = calibration.rejected.differences["AP"]
            logger.warning(
                "On the images that it was not chosen on, the setting loses %.2f points of AP "
                "(95 %%: %.2f to %.2f), not at most %g: exits.yaml has no exits. Calibrate on more "
                "images, or allow a larger drop.",
                *(-change.value, -change.high, -change.low, target.max_ap_drop),
            )
        elif not calibration.setting:
            logger.warning("No setting that was tried reaches the target: exits.yaml has no exits")
        rate = Calibrator.exit_rate(calibration.reported, calibration.full)
        if target.exit_rate is not None and rate < target.exit_rate:
            logger.warning(
                "On the images that it was not chosen on, the setting skips %.4f of the later "
                "stages' regions, not %g. Ask for more.",
                *(rate, target.exit_rate),
            )
        measured = next(row.milliseconds for row in rows if row.name == CHOSEN)
        if target.latency_ms is not None and (measured or 0.0) > target.latency_ms:
            logger.warning(
                "The setting was measured at %.1f ms per image, above the %g ms that were asked "
                "for: the latency model is not exact. Ask for less.",
                *(measured, target.latency_ms),
            )

    def expected(self, calibration: Calibration) -> dict[str, float]:
        """Figures of the setting on the images that it was not chosen on."""
        reported, full = calibration.reported, calibration.full
        plain = self.calibrator.others.run(self.calibrator.policy(calibration.plain))
        loss, deviation = self.loss(calibration.setting)
        change = calibration.differences["AP"]
        return {
            "AP": reported.figures["AP"],
            "AP_change": change.value,
            "AP_change_low": change.low,
            "AP_change_high": change.high,
            "exit_rate": self.calibrator.exit_rate(reported, full),
            "regions_left": reported.region_stages / max(full.region_stages, 1),
            "work": reported.work,
            "loss": loss,
            "loss_deviation": deviation,
            "lost_true_positives": float(reported.lost.mean()),
            "calibration_error_before": _calibration_error(plain.matched),
            "calibration_error": _calibration_error(reported.matched),
        }

    def loss(self, setting: Setting) -> tuple[float, float]:
        """The agreement loss on the images that settings are not chosen on, and its deviation."""
        # The full cascade reports its scores by the same calibration, as shadow runs do.
        scores: Setting = {key: x for key, x in setting.items() if key.startswith("SCORE_")}
        early, full = (
            self.calibrator.others.detections(self.calibrator.policy(one))
            for one in (setting, scores)
        )
        losses = np.array(
            [
                agreement_loss(*pair, min_score=self.options.score)
                for pair in zip(early, full, strict=True)
            ]
        )
        mean, deviation = float(losses.mean()), float(losses.std(ddof=1) / np.sqrt(len(losses)))
        # Where hardly any image lost anything, its deviation says too little: what a bound that
        # holds for any distribution leaves open is promised as two deviations, as drift has it.
        return mean, max(deviation, (wsr_ucb(losses, PROMISE_DELTA) - mean) / 2)

    def _write_exits(
        self,
        name: str,
        setting: Setting,
        *,
        source: Provenance,
        output_dir: Path,
        device: str = "",
    ) -> None:
        write_exits(
            self.calibrator.cfg,
            setting,
            output_dir / f"{name}.yaml",
            loss=self.loss(setting),
            score=self.options.score,
            source=source,
            device=device,
        )

    def settings(self, calibration: Calibration) -> dict[str, Setting]:
        """The setting, each of its parts alone, and each rule alone, by name."""
        learned = self.calibrator.learned
        first = calibration.rejected or calibration
        return {
            CHOSEN: calibration.setting,
            **({REJECTED: first.setting} if calibration.rejected is not None else {}),
            **_parts(first.plain),
            **usual_settings(self.calibrator.num_stages, () if learned is None else learned.names),
        }

    def measured(self, calibration: Calibration, points: Sequence[FrontPoint]) -> dict[str, float]:
        """Milliseconds per image: of points by their setting, of what is compared by its name.

        All of them are measured in one run, in turn, so that they can be held against each other.
        """
        stages = self.calibrator.num_stages
        simpler = {
            f"{most} proposals": ExitPolicy(
                num_stages=stages, region_budget=(most, *[0] * (stages - 1))
            )
            for most in PROPOSALS
            if most < self.calibrator.trials.recording.most_proposals
        }
        settings = {
            **self.settings(calibration),
            **{_key(point.setting): point.setting for point in points},
        }
        timings = time_policies(
            self.detector,
            self.batches,
            {
                FULL: None,
                **{name: self.policy_on_device(one) for name, one in settings.items()},
                **truncated_cascades(stages),
                **simpler,
            },
            rounds=self.options.rounds,
        )
        size = len(self.batches[0])
        return {
            name: median(call.milliseconds for call in calls) / size
            for name, calls in timings.items()
        }

    def compared(
        self, calibration: Calibration, milliseconds: Mapping[str, float]
    ) -> list[ComparedExits]:
        """The settings and what is simpler, see ``compare``."""
        settings = self.settings(calibration)
        policies = {name: self.calibrator.policy(one) for name, one in settings.items()}
        # By lot twice, oracles four times: see ``compare``.
        most = 1 + len(policies) + self.calibrator.num_stages - 1 + len(PROPOSALS) + 2 + 4
        with Progress("Comparing", most) as work:
            return compare(
                self.calibrator.others,
                policies,
                chosen=CHOSEN if calibration.rejected is None else REJECTED,
                milliseconds=milliseconds,
                on_row=work.step,
            )

    def front(
        self, calibration: Calibration, latency: LatencyModel
    ) -> tuple[list[FrontPoint], list[FrontPoint]]:
        """All that was tried, and of it the front, on the images that settings were chosen on."""
        search = self.calibrator.search
        points = {
            places: front_point(
                search.setting(places),
                trial,
                self.calibrator.trials.full,
                predicted=latency.per_image(trial.entered),
                chosen=search.setting(places) == calibration.plain,
            )
            for places, trial in search.tried.items()
        }
        front = pareto(search.tried, lambda trial: trial.work)
        return list(points.values()), [points[places] for places in front]

    def on_others(
        self, point: FrontPoint, latency: LatencyModel, milliseconds: Mapping[str, float]
    ) -> FrontPoint:
        """What a point is on the other half of the images."""
        trial = self.calibrator.others.run(self.calibrator.policy(point.setting))
        return front_point(
            point.setting,
            trial,
            self.calibrator.others.full,
            milliseconds=milliseconds.get(_key(point.setting)),
            predicted=latency.per_image(trial.entered),
            chosen=point.chosen,
        )

    def policy_on_device(self, setting: Setting) -> ExitPolicy:
        """The exits of a setting for the detector itself, wherever it is."""
        own = self.detector.cascade.exits
        return build_policy(self.calibrator.cfg, setting, None if own is None else own.learned)


def _key(setting: Setting) -> str:
    """A name for a setting among names of other things."""
    return f"setting {json.dumps(setting, sort_keys=True)}"


def _calibration_error(matched: MatchedDetections) -> float:
    counts = ~matched.ignored[0]
    return expected_calibration_error(matched.scores[counts], matched.hits[0][counts])


def _parts(setting: Setting) -> dict[str, Setting]:
    """Of the setting, the keys that belong together, each group alone."""
    groups = {
        "pruning alone": ("PRUNE_THRESHOLDS",),
        "learned pruner alone": ("PRUNER_THRESHOLDS",),
        "redundancy alone": ("REDUNDANCY_IOU",),
        "objectness alone": ("PROPOSAL_THRESHOLD",),
        "fewer proposals alone": ("REGION_BUDGET",),
        "acceptance alone": (
            *("CONFIDENCE", "THRESHOLDS", "LOCALISATION", "LOCALISATION_THRESHOLDS"),
        ),
    }
    parts = {
        name: {key: setting[key] for key in keys if key in setting} for name, keys in groups.items()
    }
    return {name: part for name, part in parts.items() if part and part != setting}

"""What a calibration of exits writes: YAML, table and plot, with measured milliseconds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

from cascade_det import config
from cascade_det.config.keys import as_lists
from cascade_det.core import ExitPolicy
from cascade_det.engine.calibration import Calibration, Calibrator, build_policy
from cascade_det.engine.calibration_target import Options, Target
from cascade_det.engine.recording import time_policies, truncated_cascades
from cascade_det.evaluation.agreement import agreement_loss
from cascade_det.evaluation.exit_comparison import (
    FULL,
    PROPOSALS,
    ComparedExits,
    compare,
    format_comparison,
    write_comparison,
)
from cascade_det.evaluation.exit_front import (
    FrontPoint,
    Points,
    choose_points,
    front_point,
    plot_front,
    write_front,
)
from cascade_det.evaluation.exit_search import Setting, pareto, usual_settings
from cascade_det.evaluation.image_matching import MatchedDetections
from cascade_det.evaluation.latency_model import LatencyModel
from cascade_det.evaluation.report import describe_machine
from cascade_det.evaluation.risk_bounds import wsr_ucb
from cascade_det.evaluation.score_calibration import expected_calibration_error
from cascade_det.files import atomic_path, write_json

logger = logging.getLogger(__name__)

CHOSEN = "chosen"
# A promise of the loss is broken by a sample of calibration images that looked too well.
PROMISE_DELTA = 0.025
_HEADS = "EarlyExitCascadeROIHeads"


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
        output_dir: Path,
    ) -> dict[str, Any]:
        """Compare, tell and write."""
        expected = self.expected(calibration)
        rows = self.compared(calibration)
        logger.info("On the other half of the images:\n\n%s\n", format_comparison(rows))
        tried, front = self.front(calibration, latency)
        points = choose_points(front)
        named = {n: self.calibrator.with_scores(p.setting) for n, p in points._asdict().items()}
        again = self.on_others(front, latency)
        self.write_exits(
            calibration.setting,
            output_dir / "exits.yaml",
            device="" if target.latency_ms is None else latency.device_name,
        )
        for name, setting in named.items():
            self.write_exits(setting, output_dir / f"{name}.yaml")
        write_front(list(again.values()), output_dir / "front.csv")
        write_comparison(rows, output_dir / "comparison.csv")
        plot_front(
            list(again.values()),
            output_dir / "front.png",
            points=Points(*(again[id(point)] for point in points)),
            tried=tried,
            compared=rows,
            chosen=CHOSEN,
        )
        self._warn(calibration, target, rows)
        content = {
            "target": {name: x for name, x in asdict(target).items() if x is not None},
            "setting": calibration.setting,
            "expected": expected,
            "images": {
                "chosen_on": len(self.calibrator.trials.recording.image_ids),
                "reported_on": len(self.calibrator.others.recording.image_ids),
            },
            "trials": len(self.calibrator.search.tried),
            "latency_model": latency.as_dict(),
            "machine": describe_machine(self.device, self.detector.dtype),
        }
        write_json(content, output_dir / "calibration.json")
        logger.info("Written to %s: exits.yaml and what it rests on", output_dir)
        return content

    @staticmethod
    def _warn(calibration: Calibration, target: Target, rows: Sequence[ComparedExits]) -> None:
        """Say where the outcome is not what was asked for."""
        change = calibration.differences["AP"]
        if not calibration.setting:
            logger.warning("No setting that was tried reaches the target: exits.yaml has no exits")
        if target.max_ap_drop is not None and -change.value > target.max_ap_drop:
            logger.warning(
                "On the images that it was not chosen on, the setting loses %.2f points of AP "
                "(95 %%: %.2f to %.2f), not at most %g. Calibrate on more images.",
                *(-change.value, -change.high, -change.low, target.max_ap_drop),
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

    def write_exits(self, setting: Setting, path: Path, *, device: str = "") -> None:
        """A YAML to put on top of a configuration; exits that a setting does not name are off."""
        cfg, (loss, deviation) = self.calibrator.cfg, self.loss(setting)
        exits = {
            **config.exit_values(setting),
            # A model keeps its learned parts where nobody uses them.
            "ENABLED": bool(setting or cfg.MODEL.CASCADE.EXIT.LEARNED),
            "EXPECTED_LOSS": round(loss, 6),
            "EXPECTED_LOSS_DEVIATION": round(deviation, 6),
            "DEVICE_NAME": device,
        }
        heads = cfg.MODEL.ROI_HEADS.NAME
        content = {
            "MODEL": {
                "ROI_HEADS": {"NAME": _HEADS if heads == "CascadeROIHeads" else heads},
                "CASCADE": {"EXIT": as_lists(exits)},
            },
            # What is promised of the loss is promised of these detections.
            "CASCADE": {"SHADOW_SCORE": self.options.score},
        }
        with atomic_path(path) as temporary:
            temporary.write_text(
                yaml.dump(content, Dumper=_WithoutAliases, default_flow_style=None, sort_keys=False)
            )

    def compared(self, calibration: Calibration) -> list[ComparedExits]:
        """The setting, each of its parts alone, and what is simpler; with measured times."""
        learned = self.calibrator.learned
        settings = {
            CHOSEN: calibration.setting,
            **_parts(calibration.plain),
            **usual_settings(self.calibrator.num_stages, () if learned is None else learned.names),
        }
        policies = {name: self.calibrator.policy(one) for name, one in settings.items()}
        measured = {name: self.policy_on_device(one) for name, one in settings.items()}
        stages = self.calibrator.num_stages
        simpler = {
            f"{most} proposals": ExitPolicy(
                num_stages=stages, region_budget=(most, *[0] * (stages - 1))
            )
            for most in PROPOSALS
            if most < self.calibrator.trials.recording.most_proposals
        }
        timings = time_policies(
            self.detector,
            self.batches,
            {FULL: None, **measured, **truncated_cascades(stages), **simpler},
            rounds=self.options.rounds,
        )
        size = len(self.batches[0])
        milliseconds = {
            name: median(call.milliseconds for call in calls) / size
            for name, calls in timings.items()
        }
        return compare(self.calibrator.others, policies, chosen=CHOSEN, milliseconds=milliseconds)

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
                milliseconds=latency.per_image(trial.entered),
                chosen=search.setting(places) == calibration.plain,
            )
            for places, trial in search.tried.items()
        }
        front = pareto(search.tried, lambda trial: trial.work)
        return list(points.values()), [points[places] for places in front]

    def on_others(
        self, front: Sequence[FrontPoint], latency: LatencyModel
    ) -> dict[int, FrontPoint]:
        """What points of a front are on the other half of the images, by their identity."""
        found = {}
        for point in front:
            trial = self.calibrator.others.run(self.calibrator.policy(point.setting))
            found[id(point)] = front_point(
                point.setting,
                trial,
                self.calibrator.others.full,
                milliseconds=latency.per_image(trial.entered),
                chosen=point.chosen,
            )
        return found

    def policy_on_device(self, setting: Setting) -> ExitPolicy:
        """The exits of a setting for the detector itself, wherever it is."""
        own = self.detector.cascade.exits
        return build_policy(self.calibrator.cfg, setting, None if own is None else own.learned)


class _WithoutAliases(yaml.SafeDumper):
    """Spells a value out wherever it comes."""

    def ignore_aliases(self, data: object) -> bool:
        return True


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

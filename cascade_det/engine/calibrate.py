"""The work of ``tools/calibrate_exits.py``: from a target to YAML, table and plot."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml
from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.config.keys import as_lists
from cascade_det.core import ExitPolicy
from cascade_det.data.coco import CocoDataset
from cascade_det.engine.calibration import Calibration, Calibrator, Target, with_scores
from cascade_det.engine.devices import device_name
from cascade_det.engine.inference import BatchLoader
from cascade_det.engine.recording import first_batches, record_dataset, time_policies
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
from cascade_det.evaluation.image_matching import ImageMatcher
from cascade_det.evaluation.latency_model import LatencyModel
from cascade_det.evaluation.report import describe_machine
from cascade_det.evaluation.score_calibration import expected_calibration_error
from cascade_det.files import atomic_path, write_json

logger = logging.getLogger(__name__)

CHOSEN = "chosen"
# Regions that enter the first and the later stages when latency is measured, as shares.
_SHARES = ((1.0, 1.0), *((first, later) for first in (1.0, 0.4, 0.1) for later in (0.3, 0.1, 0.02)))


@dataclass(frozen=True)
class Options:
    """How thorough a calibration is.

    Attributes:
        images: the most to record.
        trials: the most settings to try.
        score: of the detections whose loss is looked at, 0 to 1.
        seed: of the split in halves.
        timed_batches: to measure milliseconds on.
        rounds: how often each of them is run with each policy.
    """

    images: int = 2000
    trials: int = 1000
    score: float = 0.5
    seed: int = 0
    timed_batches: int = 8
    rounds: int = 3


def calibrate(
    cfg: CfgNode,
    open_detector: Callable[[], tuple[Any, CocoDataset, BatchLoader]],
    target: Target,
    output_dir: Path,
    options: Options,
) -> dict[str, Any]:
    """Find exits for a target, and write them with what is to be expected of them.

    Args:
        cfg: of the detector.
        open_detector: gives the detector (see ``cascade_det.engine.recording.Detector``), the
            calibration set with its ground truth, and a loader of it.
        target: what is wanted.
        output_dir: of ``exits.yaml``, ``quality.yaml``, ``balanced.yaml``, ``fast.yaml``,
            ``front.csv``, ``front.png``, ``comparison.csv`` and ``calibration.json``.
        options: how thorough.

    Returns:
        The content of ``calibration.json``.

    Raises:
        ConfigError: the target has no meaning, or no setting reaches it.
        SampleTooSmallError: too few images for a guarantee.
    """
    target.check()
    detector, dataset, loader = open_detector()
    target.check_images(num_images := min(options.images, len(dataset.ground_truth["images"])))
    logger.info("Recording the full cascade on %d images", num_images)
    recording = record_dataset(detector, loader, num_images)
    logger.info("Trying up to %d settings on half of them", options.trials)
    own = detector.cascade.exits
    calibrator = Calibrator(
        cfg,
        recording,
        ImageMatcher(dataset.ground_truth, dataset.category_ids),
        learned=None if own is None else own.learned,
        score=options.score,
        seed=options.seed,
        most_trials=options.trials,
    )
    job = _Job(calibrator, detector, first_batches(loader, options.timed_batches), options)
    logger.info("Measuring %d batches", len(job.batches))
    latency = job.fit_latency()
    calibration = calibrator.calibrate(target, latency)
    return job.report(
        calibration, with_scores(calibrator, calibration), target, latency, output_dir
    )


class _Job:
    def __init__(
        self, calibrator: Calibrator, detector: Any, batches: Sequence[Any], options: Options
    ) -> None:
        self.calibrator = calibrator
        self.detector = detector
        self.batches = batches
        self.options = options
        self.device = next(detector.parameters()).device

    def fit_latency(self) -> LatencyModel:
        """Measure the detector with more and fewer regions, and fit a model to the medians."""
        stages, most = self.calibrator.num_stages, self.calibrator.trials.recording.most_proposals
        budgets = [
            tuple(max(1, round(share * most)) for share in (first, *[later] * (stages - 1)))
            for first, later in _SHARES
        ]
        policies: dict[str, ExitPolicy | None] = {
            str(budget): ExitPolicy(num_stages=stages, region_budget=budget) for budget in budgets
        }
        policies |= self._truncated()
        timings = time_policies(self.detector, self.batches, policies, rounds=self.options.rounds)
        entered, milliseconds = [], []
        for calls in timings.values():
            for place in range(len(self.batches)):
                same = calls[place :: len(self.batches)]
                entered.append(same[0].entered)
                milliseconds.append(median(call.milliseconds for call in same))
        model = LatencyModel.fit(
            np.array(entered),
            np.array(milliseconds),
            device_name=device_name(self.device),
            batch_size=len(self.batches[0]),
        )
        logger.info("Latency model: %s", model)
        return model

    def report(
        self,
        calibration: Calibration,
        setting: Setting,
        target: Target,
        latency: LatencyModel,
        output_dir: Path,
    ) -> dict[str, Any]:
        """Compare, tell and write."""
        expected = self.expected(calibration, setting)
        rows = self.compared(calibration, setting)
        logger.info("On the other half of the images:\n\n%s\n", format_comparison(rows))
        tried, front = self.front(calibration, latency)
        points = choose_points(front)
        promised: Setting = {
            "EXPECTED_LOSS": round(expected["loss"], 6),
            "EXPECTED_LOSS_DEVIATION": round(expected["loss_deviation"], 6),
        }
        if target.latency_ms is not None:
            promised["DEVICE_NAME"] = latency.device_name
        score = self.options.score
        _write_exits({**setting, **promised}, score, output_dir / "exits.yaml")
        for name, point in points._asdict().items():
            _write_exits(point.setting, score, output_dir / f"{name}.yaml")
        again = self.on_others(front, latency)
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
        content = {
            "target": {name: x for name, x in asdict(target).items() if x is not None},
            "setting": setting,
            "expected": expected,
            "images": {
                "chosen_on": len(calibration.choosing),
                "reported_on": len(calibration.reporting),
            },
            "trials": len(calibration.search.tried),
            "latency_model": latency.as_dict(),
            "machine": describe_machine(self.device),
        }
        write_json(content, output_dir / "calibration.json")
        logger.info("Written to %s: exits.yaml and what it rests on", output_dir)
        return content

    def expected(self, calibration: Calibration, setting: Setting) -> dict[str, float]:
        """Figures of the setting on the images that it was not chosen on."""
        others = self.calibrator.others
        policy = self.calibrator.policy(setting)
        # The full cascade reports its scores by the same calibration, as shadow runs do.
        scores: Setting = {key: x for key, x in setting.items() if key.startswith("SCORE_")}
        early = others.detections(policy)
        full = others.detections(self.calibrator.policy(scores))
        losses = np.array(
            [
                agreement_loss(*pair, min_score=self.options.score)
                for pair in zip(early, full, strict=True)
            ]
        )
        matched = others.run(policy).matched
        counts = ~matched.ignored[0]
        plain = others.run(self.calibrator.policy(calibration.setting)).matched
        change = calibration.differences["AP"]
        return {
            "AP": calibration.full.figures()["AP"] + change.value,
            "AP_change": change.value,
            "AP_change_low": change.low,
            "AP_change_high": change.high,
            "exit_rate": self.calibrator.exit_rate(calibration.reported, calibration.full),
            "regions_left": calibration.reported.region_stages / calibration.full.region_stages,
            "work": calibration.reported.work,
            "loss": float(losses.mean()),
            "loss_deviation": float(losses.std(ddof=1) / np.sqrt(len(losses))),
            "lost_true_positives": float(calibration.reported.lost.mean()),
            "calibration_error_before": expected_calibration_error(
                plain.scores[~plain.ignored[0]], plain.hits[0][~plain.ignored[0]]
            ),
            "calibration_error": expected_calibration_error(
                matched.scores[counts], matched.hits[0][counts]
            ),
        }

    def compared(self, calibration: Calibration, setting: Setting) -> list[ComparedExits]:
        """The setting, each of its parts alone, and what is simpler; with measured times."""
        learned = self.calibrator.learned
        settings = {
            CHOSEN: setting,
            **_parts(calibration),
            **usual_settings(self.calibrator.num_stages, () if learned is None else learned.names),
        }
        policies: dict[str, ExitPolicy | None] = {
            name: self.calibrator.policy(one) for name, one in settings.items()
        }
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
            {FULL: None, **policies, **self._truncated(), **simpler},
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
        search = calibration.search
        points = {
            places: front_point(
                search.setting(places),
                trial,
                self.calibrator.trials.full,
                milliseconds=latency.per_image(trial.entered),
                chosen=search.setting(places) == calibration.setting,
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

    def _truncated(self) -> dict[str, ExitPolicy]:
        """The cascade that stops after its first stages."""
        stages = self.calibrator.num_stages
        return {
            f"{count} stage{'s' * (count > 1)}": ExitPolicy(
                num_stages=stages,
                thresholds=tuple(0.0 if gate == count - 1 else 2.0 for gate in range(stages - 1)),
            )
            for count in range(1, stages)
        }


def _write_exits(setting: Setting, score: float, path: Path) -> None:
    """A YAML to put on top of a configuration; exits that a setting does not name are off."""
    exits = config.exit_values(setting) if setting else {"ENABLED": False}
    content = {
        "MODEL": {
            "ROI_HEADS": {"NAME": "EarlyExitCascadeROIHeads"},
            "CASCADE": {"EXIT": as_lists(exits)},
        },
        # What is promised of the loss is promised of these detections.
        "CASCADE": {"SHADOW_SCORE": score},
    }
    with atomic_path(path) as temporary:
        temporary.write_text(
            yaml.dump(content, Dumper=_WithoutAliases, default_flow_style=None, sort_keys=False)
        )


class _WithoutAliases(yaml.SafeDumper):
    """Spells a value out wherever it comes."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _parts(calibration: Calibration) -> dict[str, Setting]:
    """Of the setting, the keys that belong together, each group alone."""
    setting = calibration.setting
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

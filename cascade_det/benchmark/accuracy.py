"""AP beside speed, by the evaluation of the standalone host."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.benchmark.timing import alternate, ratio, spread
from cascade_det.data.samples import Batch
from cascade_det.engine.evaluate import evaluate_dataset
from cascade_det.report.tables import Metrics, stage_names, table
from cascade_det.standalone.detector import Detector
from cascade_det.standalone.evaluate import load_detector, test_loader

logger = logging.getLogger(__name__)

_EXITS, _FAST = "MODEL.CASCADE.EXIT.ENABLED", "MODEL.CASCADE.FAST.ENABLED"
# The others are compared with the first.
SETTINGS: dict[str, tuple[Any, ...]] = {
    "exits off, float32": (_EXITS, False, _FAST, False),
    "exits": (_EXITS, True, _FAST, False),
    "fast": (_EXITS, False, _FAST, True),
    "fast, exits": (_EXITS, True, _FAST, True),
}
_METRICS = ("AP", "AP75", "AP90")
# Each is run by every setting in turn, after one more to warm up.
TIMED_BATCHES = 30


def measure_accuracy(cfg: CfgNode, output_dir: Path) -> dict[str, Any]:
    """Evaluate a trained detector in several settings on the first data set of ``DATASETS.TEST``.

    Settings with exits need exits in the configuration: default thresholds would mean nothing.
    Times are measured apart, with the settings in turn: those of one pass after another would also
    compare the minutes of a machine.

    Args:
        cfg: a configuration with ``MODEL.WEIGHTS``.
        output_dir: each setting writes its evaluation to a folder in it.

    Returns:
        ``dataset``, ``images`` (their number) and ``settings``, a list with ``setting`` (its
        name), ``AP``, ``AP75`` and ``AP90`` in percent, ``milliseconds`` (per image, a ``spread``
        over at most ``TIMED_BATCHES`` batches), ``times_as_fast`` (as the first setting, the spread
        of the ratios of each batch) and ``entered`` (mean regions per image, by stage).

    Raises:
        ConfigError: a setting contradicts the configuration; before any is evaluated.
        DatasetError: data are missing or wrong.
        CheckpointError: weights cannot be read or do not fit.
    """
    configurations = {
        name: config.changed(cfg, *options)
        for name, options in SETTINGS.items()
        if "exits" not in name.split(", ") or cfg.MODEL.CASCADE.EXIT.ENABLED
    }
    for setting in configurations.values():
        config.check_config(setting)
    rows: list[dict[str, Any]] = []
    detectors: dict[str, Detector] = {}
    for name, setting in configurations.items():
        detector, datasets = load_detector(setting)
        detectors[name] = detector
        dataset = datasets[0]
        logger.info("Accuracy: %s, %d images", name, len(dataset.records))
        results = evaluate_dataset(
            detector,
            test_loader(setting, dataset),
            dataset,
            output_dir / name.replace(", ", "_").replace(" ", "_"),
            detections_per_image=setting.TEST.DETECTIONS_PER_IMAGE,
            stages=False,
        )
        exits = results["exits"]
        rows.append(
            {
                "setting": name,
                **{metric: results["bbox"][metric] for metric in _METRICS},
                "entered": [exits[stage]["entered_per_image"] for stage in stage_names(exits)],
            }
        )
    batches = list(islice(test_loader(cfg, dataset), TIMED_BATCHES))
    milliseconds = time_in_turn(
        {n: d.detect for n, d in detectors.items()}, batches, detector.device
    )
    first = milliseconds[rows[0]["setting"]]
    for row in rows:
        own = milliseconds[row["setting"]]
        row |= {"milliseconds": spread(own), "times_as_fast": ratio(first, own)}
    return {"dataset": dataset.source.name, "images": len(dataset.records), "settings": rows}


def time_in_turn(
    detect: Mapping[str, Callable[[Batch], object]],
    batches: list[Batch],
    device: torch.device | str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds per image of each batch: all detectors run one batch, then all the next.

    Args:
        detect: by name.
        batches: at least one; the first is run once more before, untimed.
        device: of the detectors.
        clock: returns seconds.
    """
    order = [batches[0], *batches]
    calls = {name: lambda number, run=run: run(order[number]) for name, run in detect.items()}
    times = alternate(calls, rounds=len(batches), device=device, clock=clock)
    sizes = [len(batch) for batch in batches]
    return {name: [ms / n for ms, n in zip(own, sizes, strict=True)] for name, own in times.items()}


def accuracy_section(results: Metrics) -> str:
    """The results of ``measure_accuracy`` as a table in Markdown, with differences of AP."""
    first = results["settings"][0]

    def faster(row: Metrics) -> str:
        times = row["times_as_fast"]
        if row is first:
            return "1.00"
        return f"{times['median']:.2f} ({times['low']:.2f} to {times['high']:.2f})"

    rows = [
        [
            row["setting"],
            *[row[metric] for metric in _METRICS],
            *[row[metric] - first[metric] for metric in _METRICS],
            row["milliseconds"]["median"],
            faster(row),
            ", ".join(f"{count:.1f}" for count in row["entered"]),
        ]
        for row in results["settings"]
    ]
    headers = ["setting"]
    headers += [f"{metric} (%)" for metric in _METRICS] + [f"{metric} +-" for metric in _METRICS]
    headers += ["ms per image", "times as fast", "regions by stage"]
    formats = ["", ".2f", ".2f", ".2f", "+.2f", "+.2f", "+.2f", ".1f", "", ""]
    title = f"Accuracy on {results['dataset']}, {results['images']} images"
    return table(title, headers, rows, formats)

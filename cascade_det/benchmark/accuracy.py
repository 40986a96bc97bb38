"""AP beside speed, by the evaluation of the standalone host."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.engine.evaluate import evaluate_dataset
from cascade_det.report.tables import Metrics, stage_names, table
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


def measure_accuracy(cfg: CfgNode, output_dir: Path) -> dict[str, Any]:
    """Evaluate a trained detector in several settings on the first data set of ``DATASETS.TEST``.

    Settings with exits need exits in the configuration: default thresholds would mean nothing.

    Args:
        cfg: a configuration with ``MODEL.WEIGHTS``.
        output_dir: each setting writes its evaluation to a folder in it.

    Returns:
        ``dataset``, ``images`` (their number) and ``settings``, a list with ``setting`` (its
        name), ``AP``, ``AP75`` and ``AP90`` in percent, ``milliseconds`` (median per image) and
        ``entered`` (mean regions per image, by stage).

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
    rows = []
    for name, setting in configurations.items():
        detector, datasets = load_detector(setting)
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
                "milliseconds": results["latency"]["total"]["median_ms"],
                "entered": [exits[stage]["entered_per_image"] for stage in stage_names(exits)],
            }
        )
    return {"dataset": dataset.source.name, "images": len(dataset.records), "settings": rows}


def accuracy_section(results: Metrics) -> str:
    """The results of ``measure_accuracy`` as a table in Markdown, with differences of AP."""
    first = results["settings"][0]
    rows = [
        [
            row["setting"],
            *[row[metric] for metric in _METRICS],
            *[row[metric] - first[metric] for metric in _METRICS],
            row["milliseconds"],
            first["milliseconds"] / row["milliseconds"],
            ", ".join(f"{count:.1f}" for count in row["entered"]),
        ]
        for row in results["settings"]
    ]
    headers = ["setting"]
    headers += [f"{metric} (%)" for metric in _METRICS] + [f"{metric} +-" for metric in _METRICS]
    headers += ["ms per image", "times as fast", "regions by stage"]
    formats = ["", ".2f", ".2f", ".2f", "+.2f", "+.2f", "+.2f", ".1f", ".2f", ""]
    title = f"Accuracy on {results['dataset']}, {results['images']} images"
    return table(title, headers, rows, formats)

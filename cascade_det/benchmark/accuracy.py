"""The AP of settings beside their speed, by the evaluation of the standalone host."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from cascade_det.config import check_config
from cascade_det.engine.evaluate import evaluate_dataset
from cascade_det.report.tables import Metrics, stage_names, table
from cascade_det.standalone.evaluate import load_detector, test_loader

logger = logging.getLogger(__name__)

_EXITS, _FAST = "MODEL.CASCADE.EXIT.ENABLED", "MODEL.CASCADE.FAST.ENABLED"
# The first is what the others are held against.
SETTINGS: dict[str, tuple[Any, ...]] = {
    "exits off, float32": (_EXITS, False, _FAST, False),
    "exits": (_EXITS, True, _FAST, False),
    "fast": (_EXITS, False, _FAST, True),
    "fast, exits": (_EXITS, True, _FAST, True),
}
_APS = ("AP", "AP75", "AP90")


@dataclass(frozen=True)
class Accuracy:
    """A setting on a test set.

    Attributes:
        setting: its name.
        AP: in percent, as AP75 and AP90.
        milliseconds: median of an image, in this evaluation.
        entered: regions of an image that each stage computed, on average.
    """

    setting: str
    AP: float
    AP75: float
    AP90: float
    milliseconds: float
    entered: list[float]


def measure_accuracy(
    cfg: CfgNode,
    output_dir: Path,
    *,
    settings: Mapping[str, Sequence[Any]] = SETTINGS,
) -> dict[str, Any]:
    """Evaluate a trained detector in some settings on the first of ``DATASETS.TEST``.

    Args:
        cfg: a configuration with ``MODEL.WEIGHTS``.
        output_dir: gets a folder for each setting with what an evaluation writes.
        settings: keys and values on top of the configuration, by name.

    Returns:
        ``dataset``, ``images`` (how many) and ``settings`` (each as ``Accuracy``).

    Raises:
        ConfigError: a setting contradicts the configuration, or one of them is missing in it.
        DatasetError: data are missing or wrong.
        CheckpointError: weights cannot be read or do not fit.
    """
    configurations = {name: _changed(cfg, options) for name, options in settings.items()}
    rows = []
    for name, changed in configurations.items():
        detector, datasets = load_detector(changed)
        dataset = datasets[0]
        logger.info("Accuracy: %s, %d images", name, len(dataset.records))
        results = evaluate_dataset(
            detector,
            test_loader(changed, dataset),
            dataset,
            output_dir / name.replace(", ", "_").replace(" ", "_"),
            device=detector.device,
            detections_per_image=changed.TEST.DETECTIONS_PER_IMAGE,
            dtype=detector.dtype,
            stages=False,
        )
        rows.append(_accuracy(name, results))
    return {
        "dataset": dataset.source.name,
        "images": len(dataset.records),
        "settings": [asdict(row) for row in rows],
    }


def accuracy_section(results: Metrics) -> str:
    """What ``measure_accuracy`` gave, as a table: AP, and differences from the first."""
    rows = [Accuracy(**row) for row in results["settings"]]
    first = rows[0]
    cells = [
        (
            row.setting,
            *(getattr(row, name) for name in _APS),
            *(getattr(row, name) - getattr(first, name) for name in _APS),
            row.milliseconds,
            first.milliseconds / row.milliseconds,
            ", ".join(f"{count:.1f}" for count in row.entered),
        )
        for row in rows
    ]
    headers = ["setting", *(f"{name} (%)" for name in _APS), *(f"{name} +-" for name in _APS)]
    headers += ["ms per image", "times as fast", "regions by stage"]
    title = f"Accuracy on {results['dataset']}, {results['images']} images"
    return table(title, headers, cells, ("", *[".2f"] * 3, *["+.2f"] * 3, ".1f", ".2f", ""))


def settings_without_exits() -> dict[str, tuple[Any, ...]]:
    """Those of ``SETTINGS`` that a configuration without exits has."""
    return {name: options for name, options in SETTINGS.items() if options[1] is False}


def _changed(cfg: CfgNode, options: Sequence[Any]) -> CfgNode:
    changed = cfg.clone()
    changed.defrost()
    changed.merge_from_list(list(options))
    check_config(changed)
    return changed


def _accuracy(setting: str, results: Metrics) -> Accuracy:
    bbox, exits = results["bbox"], results["exits"]
    return Accuracy(
        setting,
        AP=bbox["AP"],
        AP75=bbox["AP75"],
        AP90=bbox["AP90"],
        milliseconds=results["latency"]["total"]["median_ms"],
        entered=[exits[stage]["entered_per_image"] for stage in stage_names(exits)],
    )

"""The files of a segmenter's calibration: YAML, tables and a plot."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from fvcore.common.config import CfgNode

from cascade_det.calibration.bootstrap import Difference
from cascade_det.calibration.maps.choice import Choice, MapRow
from cascade_det.calibration.maps.search import MapTrial
from cascade_det.calibration.page import write_calibration_page
from cascade_det.calibration.provenance import provenance_comment
from cascade_det.calibration.target import Target
from cascade_det.files import atomic_path, write_csv, write_json
from cascade_det.report.analysis_files import as_extra
from cascade_det.report.pages.page import REPORT_FILE
from cascade_det.report.tables import table
from cascade_det.report.text import describe_machine

logger = logging.getLogger(__name__)

MAP_FILES = (
    "exits.yaml",
    "comparison.csv",
    "comparison.png",
    "trials.csv",
    "calibration.json",
    REPORT_FILE,
)


def write_map_report(
    cfg: CfgNode,
    choice: Choice,
    trials: Sequence[MapTrial],
    target: Target,
    source: dict[str, Any],
    device: torch.device,
    folder: Path,
) -> dict[str, Any]:
    """Log the comparison, warn where the target is missed, and write ``MAP_FILES``.

    Returns:
        The content of ``calibration.json``.
    """
    logger.info("On the other half of the images:\n\n%s\n", format_rows(choice))
    if choice.missed:
        logger.warning("%s", choice.missed)
    elif choice.setting is None:
        logger.warning("No setting that was run reaches the target: exits.yaml has no exits")
    _write_yaml(cfg, choice, source, folder / "exits.yaml")
    rows = [_columns(row, choice) for row in choice.rows]
    write_csv(folder / "comparison.csv", list(rows[0]), (list(row.values()) for row in rows))
    write_csv(
        folder / "trials.csv",
        [f"{choice.metric} drop", "work", "setting"],
        ([trial.drop, trial.work, json.dumps(trial.setting)] for trial in trials),
    )
    _plot(choice, folder / "comparison.png")
    chosen = next(row for row in choice.rows if row.name == choice.name)
    content = {
        "target": {name: x for name, x in asdict(target).items() if x is not None},
        "setting": choice.setting or {},
        "expected": _columns(chosen, choice),
        "images": {"chosen_on": choice.images[0], "reported_on": choice.images[1]},
        "trials": len(trials),
        "machine": describe_machine(device),
        **source,
    }
    write_json(content, folder / "calibration.json")
    with as_extra(folder / REPORT_FILE):
        write_calibration_page(folder)
    return content


def format_rows(choice: Choice) -> str:
    """The comparison as a table: the chosen exits are marked."""
    headers = (
        "decoder",
        f"{choice.metric} (%)",
        "change",
        "later levels (%)",
        "decoder (ms)",
        "of full (%)",
        "model (ms)",
        "of full (%)",
        "right pixels lost (%)",
    )
    cells = [
        (
            f"{row.name} (chosen)" if row.name == choice.name else row.name,
            f"{row.score:.2f}",
            _interval(row.change, 2),
            f"{100 * row.computed:.1f}",
            f"{row.decoder_ms:.1f}",
            _interval(row.decoder_share, 1, 100),
            f"{row.total_ms:.1f}",
            _interval(row.total_share, 1, 100),
            f"{100 * row.lost:.2f}",
        )
        for row in choice.rows
    ]
    title = f"Mean over {choice.images[1]} images, with 95 % intervals"
    return table(title, headers, cells, "")


def _interval(x: Difference, digits: int, factor: float = 1) -> str:
    value, low, high = (f"{factor * number:.{digits}f}" for number in (x.value, x.low, x.high))
    return f"{value} ({low} to {high})"


def _columns(row: MapRow, choice: Choice) -> dict[str, Any]:
    return {
        "decoder": row.name,
        f"{choice.metric} (%)": row.score,
        "change": row.change.value,
        "change low": row.change.low,
        "change high": row.change.high,
        "later levels computed": row.computed,
        "decoder ms/image": row.decoder_ms,
        "decoder share": row.decoder_share.value,
        "decoder share low": row.decoder_share.low,
        "decoder share high": row.decoder_share.high,
        "model ms/image": row.total_ms,
        "model share": row.total_share.value,
        "right pixels lost": row.lost,
        "chosen": int(row.name == choice.name),
    }


def _write_yaml(cfg: CfgNode, choice: Choice, source: dict[str, Any], path: Path) -> None:
    own = cfg.MODEL.CASCADE_DECODER.EXIT
    values: dict[str, Any] = {"ENABLED": choice.setting is not None}
    if choice.setting is not None:
        values |= {
            "KIND": choice.setting["kind"],
            "CONFIDENCE": choice.setting["confidence"],
            "THRESHOLDS": [float(value) for value in choice.setting["thresholds"]],
            "PATCH": own.PATCH,
            "CHANNEL_GATES": own.CHANNEL_GATES,
        }
    content = {"MODEL": {"CASCADE_DECODER": {"EXIT": values}}}
    text = yaml.safe_dump(content, default_flow_style=None, sort_keys=False)
    with atomic_path(path) as temporary:
        temporary.write_text(provenance_comment(source) + text, encoding="utf-8")


def _plot(choice: Choice, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for row in choice.rows:
        kind = row.name.split()[0]
        colour, marker = _STYLES.get(kind, ("#555555", "s"))
        x, y = 100 * row.total_share.value, row.score
        chosen = row.name == choice.name
        axes.plot(x, y, marker, color=colour, markersize=11 if chosen else 6)
        if kind not in ("image", "patch"):
            # At the right border the text is left of its point.
            place, side = ((-7, -3), "right") if x > 90 else ((7, -3), "left")
            axes.annotate(
                row.name, (x, y), xytext=place, textcoords="offset points", ha=side, fontsize=8
            )
        elif chosen:
            axes.annotate("chosen", (x, y), xytext=(6, 5), textcoords="offset points")
    for kind in ("patch", "image"):
        colour, marker = _STYLES[kind]
        axes.plot([], [], marker, color=colour, label=f"exits of {_PLURALS[kind]}")
    axes.set(
        xlabel="milliseconds of the whole model (% of no exits)", ylabel=f"{choice.metric} (%)"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


_PLURALS = {"patch": "patches", "image": "images"}
_STYLES = {"patch": ("#2e8b57", "o"), "image": ("#4169e1", "^")}

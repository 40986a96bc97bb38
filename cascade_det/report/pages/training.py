"""The curves of a training, from its ``metrics.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cascade_det.report.pages.charts import COLORS, Chart, Point
from cascade_det.report.pages.line_charts import Line, line_chart
from cascade_det.report.pages.page import Plots, Section

METRICS_FILE = "metrics.json"
# Of each chart: its title, and what the names of its metrics begin with.
_LOSSES = (
    ("Loss", ("total_loss", "validation_loss", "total_val_loss")),
    ("Classification loss per stage", ("loss_cls_stage",)),
    ("Box loss per stage", ("loss_box_reg_stage",)),
    ("Losses of the proposals", ("loss_rpn",)),
    ("Further losses", ("loss_",)),
)
_SCORES = (
    ("Box AP on the test set", ("bbox/AP", "bbox/AP50", "bbox/AP75")),
    ("Mask AP on the test set", ("segm/AP", "segm/AP50", "segm/AP75")),
    ("IoU on the test set", ("sem_seg/mIoU", "sem_seg/fwIoU")),
)


def training_section(folder: Path) -> Section:
    """The curves of the training of a folder, or of the one above it; empty if there was none."""
    section = Section("training", "Training")
    file = next((f for f in _candidates(folder) if f.is_file()), None)
    if file is None:
        return section
    series, broken = read_metrics(file)
    charts = [*_charts(series)]
    if charts:
        section.blocks.append(Plots(charts))
        if broken:
            section.blocks.append(f"{broken} lines of {file.name} cannot be read and are left out.")
    return section


def read_metrics(file: Path) -> tuple[dict[str, list[Point]], int]:
    """Each metric by iteration, and the number of lines that cannot be read.

    A killed run may leave half a line. After a resume, later lines replace earlier ones.
    """
    by_name: dict[str, dict[float, float]] = {}
    broken = 0
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            iteration = float(entry.pop("iteration"))
            values = {n: float(v) for n, v in entry.items() if isinstance(v, (int, float))}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            broken += 1
            continue
        for name, value in values.items():
            by_name.setdefault(name, {})[iteration] = value
    return {name: sorted(points.items()) for name, points in by_name.items()}, broken


def _candidates(folder: Path) -> Iterator[Path]:
    yield folder / METRICS_FILE
    # Several test sets have folders of their own in that of the run.
    if (folder.parent / "config.yaml").is_file():
        yield folder.parent / METRICS_FILE


def _charts(series: Mapping[str, list[Point]]) -> Iterator[Chart]:
    used: set[str] = set()
    for title, starts in _LOSSES:
        names = [n for n in sorted(series) if n.startswith(starts) and n not in used]
        used.update(names)
        if lines := _lines(series, names[: len(COLORS)]):
            yield line_chart(title, lines, x_label="iteration", y_label="loss")
    for title, scores in _SCORES:
        if lines := _lines(series, [n for n in scores if n in series], dots="all"):
            yield line_chart(title, lines, x_label="iteration", y_label="%")
    if lines := _lines(series, [n for n in ("lr",) if n in series]):
        yield line_chart("Learning rate", lines, x_label="iteration", y_label="")


def _lines(series: Mapping[str, list[Point]], names: Sequence[str], **options: Any) -> list[Line]:
    return [
        Line(name, series[name], color, **options)
        for name, color in zip(names, COLORS, strict=False)
        if any(math.isfinite(value) for _, value in series[name])
    ]

"""The plot of an evaluation: AP and IoU per stage, exits, IoU of classes and levels, latency."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cascade_det.core.structures import EXIT_REASONS
from cascade_det.files import atomic_path
from cascade_det.report.exit_tables import exit_places
from cascade_det.report.fonts import with_fonts
from cascade_det.report.tables import part_order, stage_names
from cascade_det.text import printable

_METRIC_COLORS = {"AP": "#1b5e8c", "AP50": "#5fa8d3", "AP75": "#b5d8ee"}
_REASON_COLORS = {
    "background": "#9e9e9e",
    "redundant": "#c9a227",
    "confident": "#2e8b57",
    "budget": "#c0392b",
    "completed": "#1b5e8c",
}
_KEPT = "#e8eef3"
# With more classes the names would be illegible; the CSV has all.
_MOST_CLASSES = 30
_LONGEST_NAME = 24
_STYLE: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8}


def plot_report(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the results as a PNG with one panel per kind of metric.

    Args:
        results: the merged dicts of the evaluators.
        path: the PNG; its folder is created if missing, an old file is replaced.
    """
    panels = _panels(results)
    columns = min(2, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(6.4 * columns, 4.2 * rows), dpi=110, layout="constrained")
    for index, draw in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, index)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
    if not panels:
        figure.text(0.5, 0.5, "Nothing was measured.", ha="center", va="center")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _panels(results: Mapping[str, Any]) -> list[Callable[[Axes], None]]:
    panels: list[Callable[[Axes], None]] = []
    stages, exits = results.get("stages", {}), results.get("exits", {})
    latency = results.get("latency", {})
    if stage_names(stages):
        boxes = {name: stages[name] for name in stage_names(stages)}
        panels.append(lambda axes: _plot_ap(axes, boxes, "Box"))
        if all("segm" in stage for stage in boxes.values()):
            masks = {name: stage["segm"] for name, stage in boxes.items()}
            panels.append(lambda axes: _plot_ap(axes, masks, "Mask"))
        panels.append(lambda axes: _plot_iou(axes, stages))
    if stage_names(exits):
        panels.append(lambda axes: _plot_exits(axes, exits))
    if sem_seg := results.get("sem_seg"):
        panels.append(lambda axes: _plot_class_iou(axes, sem_seg))
    if levels := results.get("levels"):
        panels.append(lambda axes: _plot_levels(axes, levels))
    if latency.get("parts"):
        panels.append(lambda axes: _plot_latency(axes, latency))
    return panels


def _plot_ap(axes: Axes, stages: Mapping[str, Any], kind: str) -> None:
    names = list(stages)
    width = 0.27
    for offset, (metric, color) in enumerate(_METRIC_COLORS.items(), start=-1):
        positions = [index + offset * width for index in range(len(names))]
        values = [stages[name][metric] for name in names]
        bars = axes.bar(positions, values, width, label=metric, color=color)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)
    axes.set_xticks(range(len(names)), names)
    title = f"{kind} AP if the cascade stopped after a stage"
    axes.set(title=title, ylabel="AP (%)", ylim=(0, 112))
    axes.set_yticks(range(0, 101, 20))
    axes.legend(ncols=3, fontsize=8, loc="upper center", frameon=False)


def _plot_iou(axes: Axes, stages: Mapping[str, Any]) -> None:
    names = stage_names(stages)
    labels = ["proposals", *(f"after {name}" for name in names)]
    values = [stages[names[0]]["iou_before"], *(stages[name]["iou_after"] for name in names)]
    axes.plot(range(len(labels)), values, "o-", color=_METRIC_COLORS["AP"])
    for index, value in enumerate(values):
        axes.annotate(f"{value:.3f}", (index, value), (-6, 6), ha="right", **_STYLE)
    axes.set_xticks(range(len(labels)), labels)
    axes.set(title="Mean IoU of regions with their object", ylabel="IoU")
    axes.margins(x=0.1, y=0.25)


def _plot_class_iou(axes: Axes, sem_seg: Mapping[str, float]) -> None:
    """Of the classes with truth; of many, those with the lowest IoU."""
    by_name = {
        name.removeprefix("IoU-"): value
        for name, value in sem_seg.items()
        if name.startswith("IoU-") and not math.isnan(value)
    }
    chosen = sorted(by_name, key=by_name.__getitem__)[:_MOST_CLASSES]
    shown = [name for name in by_name if name in chosen]
    names, families = with_fonts(printable(name, longest=_LONGEST_NAME) for name in shown)
    values = [by_name[name] for name in shown]
    bars = axes.barh(range(len(names)), values, 0.7, color=_METRIC_COLORS["AP"])
    axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    points = 10 if len(names) <= 12 else 7
    # Names may contain "$".
    style: dict[str, Any] = {"fontsize": points, "fontfamily": families, "parse_math": False}
    axes.set_yticks(range(len(names)), names, **style)
    axes.invert_yaxis()
    left_out = len(by_name) - len(names)
    suffix = f", the lowest of {len(by_name)} classes" if left_out else ""
    mean = f"IoU of pixels{suffix}; mean {sem_seg['mIoU']:.1f}"
    axes.set(title=mean, xlabel="IoU (%)", xlim=(0, 110))
    axes.set_xticks(range(0, 101, 20))


def _plot_levels(axes: Axes, levels: Mapping[str, Any]) -> None:
    values = [level["mIoU"] for level in levels.values()]
    bars = axes.bar(range(len(levels)), values, 0.6, color=_METRIC_COLORS["AP"])
    axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)
    labels = [f"{name}\n{100 * level['left']:.0f} % end here" for name, level in levels.items()]
    axes.set_xticks(range(len(levels)), labels)
    title = "Mean IoU if the decoder stopped after a level"
    axes.set(title=title, ylabel="mean IoU (%)", ylim=(0, 112))
    axes.set_yticks(range(0, 101, 20))


def _plot_exits(axes: Axes, exits: Mapping[str, Any]) -> None:
    names = exit_places(exits)
    bottom = [0.0] * len(names)
    for reason in (*EXIT_REASONS, None):
        heights = [_regions(exits[name], reason) for name in names]
        if not any(heights):
            continue
        label, color = (reason, _REASON_COLORS[reason]) if reason else ("goes on", _KEPT)
        axes.bar(names, heights, 0.6, bottom=bottom, label=label, color=color)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for index, name in enumerate(names):
        text = f"{bottom[index]:.1f}\n{100 * exits[name]['exit_rate']:.0f} % leave early"
        axes.annotate(text, (index, bottom[index]), (0, 3), ha="center", **_STYLE)
    axes.set_ylim(0, 1.3 * max(bottom) or 1)
    axes.set(title="Regions entering each stage, by what follows", ylabel="regions per image")
    axes.legend(fontsize=8, loc="upper right", frameon=False)


def _regions(stage: Mapping[str, Any], reason: str | None) -> float:
    """Regions per image that exited for a reason; ``None``: that were kept."""
    left = stage["left"]
    share = left.get(reason, 0.0) if reason else 1.0 - sum(left.values())
    # The shares may sum to slightly less than 1 where no region is kept.
    return stage["entered_per_image"] * (share if share > 1e-9 else 0.0)


def _plot_latency(axes: Axes, latency: Mapping[str, Any]) -> None:
    series = {"as configured": (latency["parts"], latency["total"], "#2e8b57")}
    if "full_parts" in latency:
        series["without exits"] = (latency["full_parts"], latency["full_total"], "#9e9e9e")
    timed = {part for parts, _, _ in series.values() for part in parts}
    names = [*sorted(timed, key=part_order), "total"]
    height = 0.8 / len(series)
    longest = 0.0
    for number, (label, (parts, total, color)) in enumerate(series.items()):
        times = [{**parts, "total": total}.get(name) for name in names]
        medians = [time["median_ms"] if time else 0.0 for time in times]
        p95 = [time["p95_ms"] if time else 0.0 for time in times]
        positions = [
            index + (number - (len(series) - 1) / 2) * height for index in range(len(names))
        ]
        axes.barh(positions, medians, height, label=f"median, {label}", color=color)
        axes.plot(p95, positions, "k|", markersize=7, label=None if number else "p95")
        for position, middle, high in zip(positions, medians, p95, strict=True):
            end = max(middle, high)
            axes.annotate(f"{middle:.1f}", (end, position), (5, 0), va="center", **_STYLE)
        longest = max(longest, *p95)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * longest or 1)
    axes.set(title=f"Latency (batches of {latency['batch_size']})", xlabel="milliseconds per image")
    axes.legend(fontsize=8, loc="best", frameon=False)

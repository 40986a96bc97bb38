"""What a run cost: stages, exits and latency, with charts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cascade_det.core.structures import EXIT_REASONS
from cascade_det.report.exit_tables import exit_places
from cascade_det.report.pages.bar_charts import bar_chart, row_chart
from cascade_det.report.pages.charts import Chart
from cascade_det.report.pages.line_charts import Line, line_chart
from cascade_det.report.pages.page import Plots, Section, as_grid
from cascade_det.report.tables import Metrics, Table, part_order, stage_names

_REASON_COLORS = {
    "background": "grey",
    "redundant": "yellow",
    "confident": "green",
    "budget": "red",
    "completed": "blue",
}
_AP_COLORS = {"AP": "blue", "AP50": "green", "AP75": "orange"}


def work_sections(results: Metrics, texts: Mapping[str, Sequence[str]]) -> Iterator[Section]:
    """Sections of stages, exits and latency; a section may be empty.

    Args:
        results: of an evaluation.
        texts: see ``report.text.report_sections``.
    """
    for key, title, charts in (
        ("stages", "Stages", _stage_charts(results)),
        ("exits", "Exits", _exit_charts(results.get("exits"))),
        ("latency", "Latency", _latency_charts(results.get("latency"))),
    ):
        section = Section(key, title, shown(texts[key]))
        if drawn := list(charts):
            section.blocks.insert(0, Plots(drawn))
        yield section


def shown(texts: Sequence[str]) -> list[Any]:
    """Tables and sentences of the log as blocks of a page."""
    return [as_grid(text) if isinstance(text, Table) else text for text in texts]


def _stage_charts(results: Metrics) -> Iterator[Chart]:
    stages = results.get("stages") or {}
    names = stage_names(stages)
    if not names:
        return
    title = "Box AP if the cascade stopped after a stage"
    yield _ap_bars(title, names, [stages[name] for name in names])
    if all("segm" in stages[name] for name in names):
        masks = [stages[name]["segm"] for name in names]
        yield _ap_bars(title.replace("Box", "Mask"), names, masks)
    boundaries = ["proposals", *(f"after {name}" for name in names)]
    ious = [stages[names[0]]["iou_before"], *(stages[name]["iou_after"] for name in names)]
    groups = [("mean IoU", "blue", ious)]
    title = "Mean IoU of regions with their object"
    yield bar_chart(title, boundaries, groups, y_label="IoU", form=".3f")
    points = _stage_points(names, stages, results.get("latency") or {})
    if points:
        line = Line("", points, "blue", dots="all", texts=names, names=True)
        title = "Box AP against milliseconds, if the cascade stopped after a stage"
        yield line_chart(title, [line], x_label="ms per image, sum of the parts", y_label="AP (%)")


def _ap_bars(title: str, names: Sequence[str], stages: Sequence[Metrics]) -> Chart:
    groups = [(m, color, [s[m] for s in stages]) for m, color in _AP_COLORS.items()]
    return bar_chart(title, names, groups, y_label="%", most=112)


def _stage_points(
    names: Sequence[str], stages: Metrics, latency: Metrics
) -> list[tuple[float, float]]:
    """Milliseconds and AP of each stage: the medians of all parts but those of later stages."""
    parts = latency.get("parts", {})
    if any(name not in parts for name in names):
        return []
    points = []
    for index, name in enumerate(names):
        later = {part_order(other)[1] for other in names[index + 1 :]}
        kept = [
            time["median_ms"]
            for part, time in parts.items()
            if not (part.startswith(("stage", "gate")) and part_order(part)[1] in later)
        ]
        points.append((math.fsum(kept), stages[name]["AP"]))
    return points


def _exit_charts(exits: Metrics | None) -> Iterator[Chart]:
    if not exits or not stage_names(exits):
        return
    names = exit_places(exits)
    groups = []
    for reason in EXIT_REASONS:
        left = [exits[n]["entered_per_image"] * exits[n]["left"].get(reason, 0.0) for n in names]
        if any(left):
            groups.append((reason, _REASON_COLORS.get(reason, "purple"), left))
    gone = [sum(exits[name]["left"].values()) for name in names]
    # Shares may sum to slightly less than 1 where no region is kept.
    kept = [
        exits[name]["entered_per_image"] * (1 - share if 1 - share > 1e-9 else 0.0)
        for name, share in zip(names, gone, strict=True)
    ]
    notes = [f"{100 * exits[name]['exit_rate']:.0f} % leave early" for name in names]
    yield bar_chart(
        "Regions that enter each stage, by what follows",
        names,
        [*groups, ("goes on", "pale", kept)] if any(kept) else groups,
        y_label="per image",
        stacked=True,
        notes=notes,
    )


def _latency_charts(latency: Metrics | None) -> Iterator[Chart]:
    if not latency or "parts" not in latency:
        return
    series = {"as configured": ("green", latency["parts"])}
    if "full_parts" in latency:
        series["without exits"] = ("grey", latency["full_parts"])
    timed = set(itertools.chain(*(parts for _, parts in series.values())))
    names = sorted(timed, key=part_order)
    nothing = {"median_ms": 0.0}
    groups = [
        (label, color, [parts.get(name, nothing)["median_ms"] for name in names])
        for label, (color, parts) in series.items()
    ]
    title = f"Median time per image (batches of {latency['batch_size']})"
    yield row_chart(title, names, groups, x_label="ms")

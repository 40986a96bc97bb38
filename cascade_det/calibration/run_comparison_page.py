"""The page of two evaluations side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cascade_det.calibration.bootstrap import BOOTSTRAP_ROUNDS, CONFIDENCE
from cascade_det.calibration.run_comparison import ComparedMetric, RunComparison
from cascade_det.report.pages.bar_charts import interval_chart, row_chart
from cascade_det.report.pages.charts import Chart
from cascade_det.report.pages.line_charts import Line, line_chart
from cascade_det.report.pages.page import Grid, Plots, Section, number, write_page
from cascade_det.report.tables import Metrics, part_order

_TITLES = {"bbox": "Boxes", "segm": "Masks"}
_COLORS = {"A": "blue", "B": "orange"}
_MOST_INTERVALS = 40  # Classes in a chart.


def write_comparison_page(
    path: Path,
    names: Sequence[str],
    results: Sequence[Metrics],
    compared: Mapping[str, RunComparison],
) -> None:
    """Write the page; an old file is replaced in one step.

    Args:
        path: of the HTML file.
        names: of both runs, A and B.
        results: their evaluations.
        compared: by task, ``bbox`` and, if both have masks, ``segm``.
    """
    runs = dict(zip("AB", results, strict=True))
    sections = [
        Section("runs", "Runs", [*_runs(names, runs)]),
        *(_compared(task, one) for task, one in compared.items()),
        Section("curves", "Curves", [*_curves(runs)]),
        Section("latency", "Exits and latency", [*_work(runs)]),
        Section("configuration", "Configuration", [*_configuration(runs)]),
    ]
    facts = []
    for task, one in compared.items():
        ap, title = one.overall["AP"], "box AP" if task == "bbox" else "mask AP"
        facts += [(f"{title}, A", f"{ap.a:.1f}"), (f"{title}, B", f"{ap.b:.1f}")]
        facts.append(("B - A", _interval(ap)))
    data = results[0].get("data") or {}
    where = f" on {data['name']}" if "name" in data else ""
    write_page(path, f"Two evaluations{where}", facts, sections)


def _runs(names: Sequence[str], runs: Mapping[str, Metrics]) -> Iterator[Any]:
    machines = [run.get("machine") or {} for run in runs.values()]
    rows = [("folder", *names)]
    rows.append(("weights", *(_setting(run, "MODEL.WEIGHTS") for run in runs.values())))
    for name in dict.fromkeys(name for one in machines for name in one):
        rows.append((name, *(number(one.get(name)) for one in machines)))
    yield Grid("", ("", "A", "B"), rows, of_text=True)
    if machines[0] != machines[1]:
        yield "The machines differ: compare milliseconds with care."


def _setting(results: Metrics, key: str) -> str:
    _, value = (results.get("config") or {}).get(key, ("", "-"))
    return str(value)


def _compared(task: str, compared: RunComparison) -> Section:
    title = _TITLES[task]
    section = Section(task, f"{title}: average precision")
    rows = [
        (name, f"{metric.a:.2f}", f"{metric.b:.2f}", _interval(metric))
        for name, metric in compared.overall.items()
    ]
    headers = ("", "A", "B", f"B - A [{100 * CONFIDENCE:g} %]")
    section.blocks += [
        f"Intervals are those of the paired bootstrap: {BOOTSTRAP_ROUNDS} resamples of the "
        f"{compared.images:,} images, the same for both. One that contains 0 shows no clear "
        "difference; of many classes, a few leave 0 out by chance.",
        Grid("All classes (%)", headers, rows),
    ]
    of_class = sorted(compared.per_class, key=lambda c: -abs(c.metrics["AP"].difference.value))
    shown = of_class[:_MOST_INTERVALS]
    values = [
        (change.value, change.low, change.high)
        for change in (c.metrics["AP"].difference for c in shown)
    ]
    chart_title = f"{title}: change of AP per class, with intervals"
    if len(shown) < len(of_class):
        chart_title += f"; the {len(shown)} of {len(of_class)} classes that differ most"
    labels = [c.label for c in shown]
    section.blocks.append(
        Plots([interval_chart(chart_title, labels, values, x_label="percent points, B - A")])
    )
    per_class = [
        (
            c.label,
            f"{c.objects:,}",
            *(
                cell
                for name in ("AP", "AP50", "AP75")
                for cell in (
                    f"{c.metrics[name].a:.1f}",
                    f"{c.metrics[name].b:.1f}",
                    _interval(c.metrics[name], ".1f"),
                )
            ),
        )
        for c in compared.per_class
    ]
    columns = [f"{name}, {of}" for name in ("AP", "AP50", "AP75") for of in ("A", "B", "B - A")]
    section.blocks.append(Grid("Each class (%)", ("class", "objects", *columns), per_class))
    return section


def _interval(metric: ComparedMetric, form: str = ".2f") -> str:
    change = metric.difference
    value, low, high = (f"{x:+{form}}" for x in (change.value, change.low, change.high))
    return f"{value} [{low}, {high}]"


def _curves(runs: Mapping[str, Metrics]) -> Iterator[Plots]:
    found = {name: (run.get("analysis") or {}).get("curves") for name, run in runs.items()}
    of_run = {name: curves for name, curves in found.items() if curves}
    if len(of_run) < len(runs):  # Of an earlier version.
        return
    precision = [
        Line(f"{name}, {metric}", list(zip(c["recalls"], c[f"precision_{metric}"], strict=False)),
             _COLORS[name], dashed=metric == "AP75")
        for name, c in of_run.items()
        for metric in ("AP50", "AP75")
    ]  # fmt: skip
    f1 = [
        Line(name, list(zip(c["scores"], c["F1"], strict=True)), _COLORS[name])
        for name, c in of_run.items()
    ]
    yield Plots(
        [
            line_chart(
                "Precision over recall, mean of the classes",
                precision,
                x_label="recall (%)",
                y_label="precision (%)",
                x_range=(0, 100),
                y_range=(0, 100),
            ),
            line_chart(
                "F1 over the score, all classes",
                f1,
                x_label="least score",
                y_label="F1 (%)",
                y_range=(0, 100),
            ),
        ]
    )


def _work(runs: Mapping[str, Metrics]) -> Iterator[Any]:
    latency = {name: run.get("latency") or {} for name, run in runs.items()}
    charts: list[Chart] = []
    if all("parts" in one for one in latency.values()):
        parts = sorted({p for one in latency.values() for p in one["parts"]}, key=part_order)
        groups = [
            (
                name,
                _COLORS[name],
                [one["parts"].get(p, {}).get("median_ms", math.nan) for p in parts],
            )
            for name, one in latency.items()
        ]
        charts.append(row_chart("Median time per image", parts, groups, x_label="ms"))
        dots = [
            Line(name, [(one["total"]["median_ms"], runs[name]["bbox"]["AP"])], _COLORS[name],
                 dots="only", texts=[name], names=True)
            for name, one in latency.items()
        ]  # fmt: skip
        title = "Box AP against milliseconds"
        charts.append(line_chart(title, dots, x_label="ms per image", y_label="AP (%)"))
    yield Plots(charts)
    figures = {
        "ms per image, median": ("latency", "total", "median_ms"),
        "stages per region": ("exits", "stages_per_region"),
        "FLOPs of the heads left": ("exits", "head_flops_share"),
    }
    if any((run.get("exits") or {}).get("tiles") for run in runs.values()):
        figures["tiles of the finest map computed"] = ("exits", "tiles", "computed_share")
    rows = [(t, *(_nested(run, *keys) for run in runs.values())) for t, keys in figures.items()]
    yield Grid("", ("", "A", "B"), rows)


def _nested(value: Any, *keys: str) -> str:
    for key in keys:
        value = (value or {}).get(key)
    return number(value, ".2f")


def _configuration(runs: Mapping[str, Metrics]) -> Iterator[Any]:
    configs = [run.get("config") or {} for run in runs.values()]
    rows = []
    for key in dict.fromkeys(key for one in configs for key in one):
        default = next(one[key][0] for one in configs if key in one)
        values = [one[key][1] if key in one else default for one in configs]
        if values[0] != values[1]:
            rows.append((key, *map(str, values)))
    if rows:
        yield Grid("Keys that differ between the runs", ("key", "A", "B"), rows, of_text=True)

"""Charts of lines and dots over two axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cascade_det.report.pages.charts import (
    BOTTOM,
    RIGHT,
    Chart,
    Entry,
    Mark,
    Point,
    Scale,
    Tick,
    range_of,
    scales,
    shown_number,
    ticks,
)

_SMALL = 310, 230
_MOST_POINTS = 600  # Of a line: more cannot be seen.


@dataclass(frozen=True)
class Line:
    """Points to join, or dots alone.

    Attributes:
        label: in the legend; empty for none.
        points: those with a nan are left out.
        color: one of ``COLORS``.
        dashed: a dashed line.
        dots: ``none``, ``all`` (with the line) or ``only``.
        texts: of the dots, shown on hovering; empty or one per point.
        names: whether texts are written beside the dots.
        errors: the low and high end of a bar through each dot; empty or one per point.
        hollow: dots with a border alone.
    """

    label: str
    points: Sequence[Point]
    color: str
    dashed: bool = False
    dots: str = "none"
    texts: Sequence[str] = ()
    names: bool = False
    errors: Sequence[Point] = ()
    hollow: bool = False


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    x_range: Point | None = None,
    y_range: Point | None = None,
    log_x: bool = False,
    small: bool = False,
) -> Chart:
    """Lines and dots over two axes; ``x_range`` and ``y_range`` are those of the points if None."""
    chart = Chart(title, x_label, y_label)
    if small:
        chart.width, chart.height = _SMALL
        chart.right, chart.bottom = chart.width - RIGHT, chart.height - BOTTOM
    kept = [p for line in lines for p in line.points if _drawable(p, log_x)]
    ends = [e for line in lines for error in line.errors for e in error if math.isfinite(e)]
    x_low, x_high = x_range or range_of([x for x, _ in kept], log=log_x)
    y_low, y_high = y_range or range_of([*(y for _, y in kept), *ends])
    x, y = scales(chart, (x_low, x_high), (y_low, y_high), log_x=log_x)
    chart.x_ticks = [Tick(x(v), shown_number(v)) for v in ticks(x_low, x_high, log=log_x)]
    chart.y_ticks = [Tick(y(v), shown_number(v)) for v in ticks(y_low, y_high)]
    for line in lines:
        chart.marks += _marks_of(line, x, y, log_x)
        if line.label:
            is_line = line.dots != "only"
            entry = Entry(line.label, line.color, is_line, line.dashed, line.hollow)
            chart.legend.append(entry)
    return chart


def _marks_of(line: Line, x: Scale, y: Scale, log_x: bool) -> list[Mark]:
    marks = []
    drawn = [(i, p) for i, p in enumerate(line.points) if _drawable(p, log_x)]
    if line.dots != "only" and drawn:
        step = max(1, len(drawn) // _MOST_POINTS)
        thinned = [*drawn[:-1:step], drawn[-1]]
        path = "M" + "L".join(f"{x(px)} {y(py)}" for _, (px, py) in thinned)
        marks.append(Mark("line", line.color, line.label, path=path, dashed=line.dashed))
    for index, error in enumerate(line.errors):
        if _drawable(line.points[index], log_x):
            at, low, high = x(line.points[index][0]), y(error[0]), y(error[1])
            path = f"M{at} {low}L{at} {high}M{at - 4} {low}h8M{at - 4} {high}h8"
            marks.append(Mark("line", line.color, line.label, path=path))
    if line.dots != "none":
        for index, (px, py) in drawn:
            text = line.texts[index] if line.texts else f"{shown_number(px)}, {shown_number(py)}"
            dot = Mark("dot", line.color, text, x(px), y(py), hollow=line.hollow)
            marks.append(dot)
            if line.names:
                marks.append(Mark("text", text=text, x=x(px), y=y(py) - 8))
    return marks


def _drawable(point: Point, log_x: bool) -> bool:
    return all(map(math.isfinite, point)) and (not log_x or point[0] > 0)

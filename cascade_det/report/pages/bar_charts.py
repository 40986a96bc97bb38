"""Charts of named places: bars and intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cascade_det.report.pages.charts import (
    BOTTOM,
    TOP,
    Chart,
    Entry,
    Mark,
    Tick,
    range_of,
    rounded,
    scales,
    shown_number,
    ticks,
)
from cascade_det.text import printable

_NAMES = 112  # Room on the left for names.
_LONGEST_NAME = 17  # Characters that fit there.
_ROW = 22  # Height of a horizontal bar.
_GAP = 8  # Below the bars of a name.
_LEAST_BAR = 28  # The width of an upright bar whose number fits above it.


def bar_chart(
    title: str,
    names: Sequence[str],
    groups: Sequence[tuple[str, str, Sequence[float]]],
    *,
    y_label: str,
    most: float | None = None,
    stacked: bool = False,
    notes: Sequence[str] = (),
    form: str = ".1f",
) -> Chart:
    """Upright bars, beside each other or stacked.

    Args:
        title: of the chart.
        names: of the places on the horizontal axis.
        groups: label, colour and a height for each place; a nan has no bar.
        y_label: of the vertical axis.
        most: its end.
        stacked: on top of each other.
        notes: a text above each place.
        form: of the numbers above bars beside each other.
    """
    chart = Chart(title, "", y_label)
    heights = [[0.0 if math.isnan(v) else v for v in values] for _, _, values in groups]
    tops = [sum(column) if stacked else max(column) for column in zip(*heights, strict=True)]
    end = most or 1.15 * max(tops, default=0.0) or 1.0
    _, y = scales(chart, (0, 1), (0, end))
    chart.y_ticks = [Tick(y(v), shown_number(v)) for v in ticks(0, end)]
    room = (chart.right - chart.left) / max(len(names), 1)
    centers = [chart.left + (index + 0.5) * room for index in range(len(names))]
    width = round(0.7 * room / (1 if stacked else max(len(groups), 1)), 1)
    below = [0.0] * len(names)
    for number, ((label, color, _), values) in enumerate(zip(groups, heights, strict=True)):
        for index, value in enumerate(values):
            shift = 0.0 if stacked else number - (len(groups) - 1) / 2
            left = centers[index] + (shift - 0.5) * width
            base = below[index]
            text = f"{names[index]}, {label}: {value:{form}}"
            top, bottom = y(base + value), y(base)
            bar = Mark("bar", color, text, rounded(left), top, width - 1, rounded(bottom - top))
            chart.marks.append(bar)
            if stacked:
                below[index] += value
            elif width >= _LEAST_BAR:
                middle, above = rounded(left + width / 2), y(value) - 4
                chart.marks.append(Mark("text", text=f"{value:{form}}", x=middle, y=above))
        if len(groups) > 1:
            chart.legend.append(Entry(label, color))
    for center, top, note in zip(centers, tops, notes, strict=False):
        chart.marks.append(Mark("text", text=note, x=rounded(center), y=y(top) - 6))
    chart.x_ticks = [Tick(rounded(c), name) for c, name in zip(centers, names, strict=True)]
    return chart


def row_chart(
    title: str,
    names: Sequence[str],
    groups: Sequence[tuple[str, str, Sequence[float]]],
    *,
    x_label: str,
    most: float | None = None,
) -> Chart:
    """Horizontal bars, of each place below each other; arguments as for ``bar_chart``."""
    thick = max(8, _ROW - 6 * (len(groups) - 1))
    chart = _rows(title, names, x_label, thick * len(groups) + _GAP)
    values = [v for _, _, of_group in groups for v in of_group if math.isfinite(v)]
    end = most or 1.15 * max(values, default=0.0) or 1.0
    x, _ = scales(chart, (0, end), (0, 1))
    chart.x_ticks = [Tick(x(v), shown_number(v)) for v in ticks(0, end)]
    for number, (label, color, of_group) in enumerate(groups):
        for name, row, value in zip(names, chart.y_ticks, of_group, strict=True):
            if not math.isfinite(value):
                continue
            top = rounded(row.at + (number - len(groups) / 2) * thick)
            width, text = rounded(x(value) - chart.left), f"{value:.1f}"
            hover = f"{name}, {label}: {text}"
            chart.marks.append(Mark("bar", color, hover, chart.left, top, width, thick - 1))
            at = rounded(chart.left + width + 5), rounded(top + thick / 2 + 4)
            chart.marks.append(Mark("text", text=text, x=at[0], y=at[1], anchor="start"))
        if len(groups) > 1:
            chart.legend.append(Entry(label, color))
    return chart


def interval_chart(
    title: str, names: Sequence[str], values: Sequence[tuple[float, float, float]], *, x_label: str
) -> Chart:
    """A dot and an interval for each name, around zero.

    Args:
        title: of the chart.
        names: from the top down.
        values: of each name the value, and the low and the high end; a nan is left out.
        x_label: of the axis.
    """
    chart = _rows(title, names, x_label, _ROW)
    low, high = range_of([0.0, *(v for row in values for v in row if math.isfinite(v))])
    x, _ = scales(chart, (low, high), (0, 1))
    chart.x_ticks = [Tick(x(v), shown_number(v)) for v in ticks(low, high)]
    zero = f"M{x(0)} {chart.top}V{chart.bottom}"
    chart.marks.append(Mark("line", "grey", "no difference", path=zero))
    for name, row, ends in zip(names, chart.y_ticks, values, strict=True):
        if not all(map(math.isfinite, ends)):
            continue
        value, least, most = ends
        # Certain only where the interval leaves zero out.
        color = "grey" if least <= 0 <= most else "green" if value > 0 else "red"
        text = f"{name}: {value:+.2f} ({least:+.2f} to {most:+.2f})"
        path = f"M{x(least)} {row.at}H{x(most)}M{x(least)} {row.at - 4}v8M{x(most)} {row.at - 4}v8"
        chart.marks.append(Mark("line", color, text, path=path))
        chart.marks.append(Mark("dot", color, text, x(value), row.at))
    return chart


def _rows(title: str, names: Sequence[str], x_label: str, height: int) -> Chart:
    """A chart with a row of this height for each name, whose middle is a tick."""
    chart = Chart(title, x_label, left=_NAMES)
    chart.height = TOP + height * len(names) + BOTTOM
    chart.bottom = chart.height - BOTTOM
    chart.y_ticks = [
        Tick(rounded(chart.top + (i + 0.5) * height), printable(name, longest=_LONGEST_NAME))
        for i, name in enumerate(names)
    ]
    return chart

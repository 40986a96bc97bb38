"""Charts as values that a template draws as SVG, with the colours of the page.

This is what all share; see ``line_charts`` and ``bar_charts``. Positions are in the units of a
chart's view box. matplotlib chooses the ticks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from matplotlib.ticker import LogLocator, MaxNLocator

COLORS = ("blue", "orange", "green", "purple", "red", "yellow", "grey")
_WIDTH, _HEIGHT = 460, 300
_LEFT, RIGHT, TOP, BOTTOM = 48, 14, 26, 40

Point = tuple[float, float]
Scale = Callable[[float], float]


class Tick(NamedTuple):
    """A line of the grid and its number."""

    at: float
    text: str


class Entry(NamedTuple):
    """A line of the legend."""

    text: str
    color: str
    line: bool = False
    dashed: bool = False
    hollow: bool = False


@dataclass(frozen=True)
class Mark:
    """A shape; which attributes count depends on its ``kind``: bar, line, dot or text."""

    kind: str
    color: str = "blue"
    text: str = ""
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0
    height: float = 0.0
    path: str = ""
    radius: float = 3.5
    dashed: bool = False
    hollow: bool = False
    anchor: str = "middle"


@dataclass
class Chart:
    """A chart with its axes."""

    title: str
    x_label: str = ""
    y_label: str = ""
    x_ticks: list[Tick] = field(default_factory=list)
    y_ticks: list[Tick] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    legend: list[Entry] = field(default_factory=list)
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = _LEFT
    right: int = _WIDTH - RIGHT
    top: int = TOP
    bottom: int = _HEIGHT - BOTTOM


def scales(chart: Chart, xs: Point, ys: Point, *, log_x: bool = False) -> tuple[Scale, Scale]:
    """The positions of values along both axes, given their ends; what is beyond is moved there."""

    def along(value: float) -> float:
        return math.log10(value) if log_x else value

    low, high = along(xs[0]), along(xs[1])

    def x(value: float) -> float:
        share = (along(value) - low) / ((high - low) or 1)
        return rounded(chart.left + min(max(share, 0.0), 1.0) * (chart.right - chart.left))

    def y(value: float) -> float:
        share = (value - ys[0]) / ((ys[1] - ys[0]) or 1)
        return rounded(chart.bottom - min(max(share, 0.0), 1.0) * (chart.bottom - chart.top))

    return x, y


def range_of(values: Sequence[float], *, log: bool = False) -> Point:
    """Ends of an axis with room around the values."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if log:
        return (low / 1.2, high * 1.2) if values else (1.0, 10.0)
    margin = 0.1 * (high - low) or 0.05 * abs(high) or 0.5
    return low - margin, high + margin


def ticks(low: float, high: float, *, log: bool = False) -> list[float]:
    """Round numbers between the ends of an axis."""
    locator = LogLocator(subs=(1, 2, 5)) if log else MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
    return [float(v) for v in locator.tick_values(low, high) if low <= v <= high]


def shown_number(value: float) -> str:
    """A number beside an axis."""
    return f"{round(value, 10):,.10g}" if abs(value) < 1e6 else f"{value:.3g}"


def rounded(value: float) -> float:
    """A position, as exact as can be seen."""
    return round(value, 1)

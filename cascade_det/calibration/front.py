"""The front of AP against work and against milliseconds, as a table and as a plot.

AP is shown as its change against the full cascade on the same images, so that points of the images
that settings were chosen on and of others share one axis. Milliseconds in the plot are measured,
all of them in one run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from cascade_det.calibration.comparison import FULL, ComparedExits
from cascade_det.calibration.search import Setting
from cascade_det.calibration.trials import Outcome
from cascade_det.files import atomic_path, write_csv

QUALITY_DROP, FAST_DROP = 0.1, 1.0  # Percent points of AP.


@dataclass(frozen=True)
class FrontPoint:
    """A setting and what it does.

    Attributes:
        setting: keys of ``MODEL.CASCADE.EXIT``.
        ap: in percent.
        drop: percent points of AP below the full cascade; negative above it.
        work: share of the full cascade's FLOPs in box heads, 0 to 1.
        region_shares: share of all proposals that enters each of the S stages, 0 to 1.
        milliseconds: per image, as measured; ``None`` where it was not.
        predicted: the same as a latency model has it; ``None`` without one.
        chosen: whether it is the one that the target led to.
    """

    setting: Setting
    ap: float
    drop: float
    work: float
    region_shares: tuple[float, ...]
    milliseconds: float | None = None
    predicted: float | None = None
    chosen: bool = False


class Points(NamedTuple):
    """Three settings of a front, from careful to quick."""

    quality: FrontPoint
    balanced: FrontPoint
    fast: FrontPoint


def front_point(
    setting: Setting,
    trial: Outcome,
    full: Outcome,
    *,
    milliseconds: float | None = None,
    predicted: float | None = None,
    chosen: bool = False,
) -> FrontPoint:
    """What a trial is as a point.

    Args:
        setting: that was tried.
        trial: of it.
        full: of the full cascade on the same images.
        milliseconds: per image, as measured.
        predicted: per image, as a model has it.
        chosen: whether the target led to it.
    """
    ap = trial.figures["AP"]
    shares = trial.entered.sum(axis=1) / max(full.entered[0].sum(), 1)
    return FrontPoint(
        setting=setting,
        ap=ap,
        drop=full.figures["AP"] - ap,
        work=trial.work,
        region_shares=tuple(shares.tolist()),
        milliseconds=milliseconds,
        predicted=predicted,
        chosen=chosen,
    )


def spread_out(front: Sequence[FrontPoint], most: int) -> list[FrontPoint]:
    """At most so many points of a front, by work from the first to the last."""
    by_work = sorted(front, key=lambda point: point.work)
    places = np.linspace(0, len(by_work) - 1, min(most, len(by_work))).round().astype(int)
    return [by_work[place] for place in places]


def choose_points(front: Sequence[FrontPoint]) -> Points:
    """Three settings of a front; AP and work are relative to the full cascade.

    Quality is the least work at a drop of AP of at most 0.1 percent points, and the smallest drop
    where none is that small. Fast is the least work at a drop of at most 1.0, and quality where
    there is none. Balanced is the knee between them: the point farthest above the straight line
    from quality to fast, over the logarithm of work; quality where none is above it.

    Raises:
        ValueError: the front has no point.
    """
    if not front:
        raise ValueError("a front without points has none to choose")
    most_accurate = min(front, key=lambda point: (point.drop, point.work))
    quality = _cheapest(front, QUALITY_DROP) or most_accurate
    fast = _cheapest(front, FAST_DROP) or quality
    between = [quality, *(p for p in front if fast.work < p.work < quality.work)]
    return Points(quality, max(between, key=lambda p: _above_chord(p, quality, fast)), fast)


def write_front(front: Sequence[FrontPoint], path: str | os.PathLike[str]) -> None:
    """Write points as CSV, settings as JSON; an old file is replaced in one step."""
    stages = range(len(front[0].region_shares)) if front else ()
    headers = [
        *("AP (%)", "AP drop", "head FLOPs left"),
        *(f"regions in stage {stage}" for stage in stages),
        *("ms/image (predicted)", "ms/image (measured)", "chosen", "setting"),
    ]
    rows = (
        [
            *(p.ap, p.drop, p.work, *p.region_shares, p.predicted, p.milliseconds),
            *(int(p.chosen), json.dumps(p.setting)),
        ]
        for p in front
    )
    write_csv(path, headers, rows)


def plot_front(
    front: Sequence[FrontPoint],
    path: str | os.PathLike[str],
    *,
    profiles: Mapping[str, FrontPoint] | None = None,
    tried: Sequence[FrontPoint] = (),
    compared: Sequence[ComparedExits] = (),
    chosen: Sequence[str] = (),
) -> None:
    """Draw a front as a PNG: over the work and, where some are known, over the milliseconds.

    Args:
        front: at least one point.
        path: the PNG; its folder is made where it is missing, an old file is replaced.
        profiles: points to mark, by names that are written beside them.
        tried: all that the search saw, on the images that it saw.
        compared: see ``compare``; one mark for each kind.
        chosen: names among them that get an error bar.

    Raises:
        ValueError: the front has no point.
    """
    if not front:
        raise ValueError("a front without points cannot be drawn")
    panels: list[tuple[str, _Cost]] = [("work of the box heads (% of the full cascade)", _percent)]
    if any(point.milliseconds is not None for point in front):
        panels.append(("time per image (ms, measured)", _milliseconds))
    figure = Figure(figsize=(7.5 * len(panels), 6.4), dpi=110, layout="constrained")
    for place, (label, cost) in enumerate(panels, start=1):
        first = figure.axes[0] if figure.axes else None
        axes = figure.add_subplot(1, len(panels), place, sharey=first)
        _draw(axes, cost, front, profiles or {}, tried)
        _mark(axes, cost, compared, chosen)
        _dress(axes, label, wide=cost is _percent)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


_Cost = Callable[["FrontPoint | ComparedExits"], float]
_TINY = 1e-6
# All else is drawn as it is on the other half.
_TRIED = "tried, on the half that chose"
_BLUE, _RED = "#1b5e8c", "#c0392b"


@dataclass(frozen=True)
class _Kind:
    """Exits that are compared, as one entry of the legend."""

    label: str
    belongs: Callable[[str], bool]
    color: str
    shape: str


# The first that a name belongs to.
_KINDS = (
    _Kind("oracles", lambda name: name.startswith("oracle"), "#2e8b57", "P"),
    _Kind("by lot", lambda name: name.startswith("random"), "#8a8a8a", "X"),
    _Kind("fewer stages or proposals", lambda name: name[0].isdigit(), "#e08214", "v"),
    _Kind("one rule", lambda name: True, "#444444", "h"),
)


def _percent(point: FrontPoint | ComparedExits) -> float:
    return 100 * max(point.work, _TINY)


def _milliseconds(point: FrontPoint | ComparedExits) -> float:
    return float("nan") if point.milliseconds is None else point.milliseconds


def _cheapest(front: Sequence[FrontPoint], most_drop: float) -> FrontPoint | None:
    good = [point for point in front if point.drop <= most_drop]
    return min(good, key=lambda point: (point.work, point.drop), default=None)


def _above_chord(point: FrontPoint, quality: FrontPoint, fast: FrontPoint) -> float:
    """How much more AP a point has than the straight line from quality to fast at its work."""
    x, left, right = (np.log(max(p.work, _TINY)) for p in (point, fast, quality))
    share = (x - left) / (right - left) if right > left else 1.0
    return float(fast.drop + share * (quality.drop - fast.drop) - point.drop)


def _draw(
    axes: Axes,
    cost: _Cost,
    front: Sequence[FrontPoint],
    profiles: Mapping[str, FrontPoint],
    tried: Sequence[FrontPoint],
) -> None:
    seen = [(cost(p), -p.drop) for p in tried]
    if seen and np.isfinite([x for x, _ in seen]).any():
        axes.plot(*zip(*seen, strict=True), ".", color="#c4ccd3", ms=4, zorder=1, label=_TRIED)
    line = sorted((cost(p), -p.drop) for p in front if np.isfinite(cost(p)))
    axes.plot(*zip(*line, strict=True), "o-", color=_BLUE, ms=3.5, lw=1.2, label="front")
    for place, (name, point) in enumerate(profiles.items()):
        at = cost(point), -point.drop
        label = "profile, by its name" if place == 0 else None
        axes.plot(*at, "s", ms=10, mfc="none", mec=_BLUE, mew=1.6, label=label)
        _write(axes, name, at, color=_BLUE, below=place % 2 == 1)


def _write(
    axes: Axes, text: str, at: tuple[float, float], *, color: str, below: bool = False
) -> None:
    axes.annotate(
        text,
        at,
        xytext=(0, -16 if below else 10),
        textcoords="offset points",
        ha="center",
        color=color,
        fontsize=9,
        annotation_clip=False,
    )


def _mark(
    axes: Axes, cost: _Cost, compared: Sequence[ComparedExits], chosen: Sequence[str]
) -> None:
    labelled = set()
    for row in compared:
        at = cost(row), row.differences["AP"].value
        if not np.isfinite(at[0]):
            continue
        if row.name == FULL:
            axes.plot(*at, "*", color="k", ms=11, zorder=4)
            _write(axes, FULL, at, color="k")
        elif row.name in chosen:
            axes.errorbar(
                *at,
                _spread(row),
                fmt="o",
                color=_RED,
                mfc=_RED if row.name == chosen[0] else "w",
                ms=8,
                capsize=4,
                zorder=5,
                label=f"{row.name} (95 %)",
            )
        else:
            kind = next(kind for kind in _KINDS if kind.belongs(row.name))
            label = None if kind in labelled else kind.label
            labelled.add(kind)
            axes.plot(*at, kind.shape, color=kind.color, ms=8, mec="w", label=label)


def _spread(row: ComparedExits) -> list[list[float]]:
    change = row.differences["AP"]
    return [[max(change.value - change.low, 0.0)], [max(change.high - change.value, 0.0)]]


def _dress(axes: Axes, label: str, *, wide: bool) -> None:
    for drop in (0.0, QUALITY_DROP, FAST_DROP):
        axes.axhline(-drop, color="#888888", lw=0.8, ls=":" if drop else "-", zorder=0)
    if wide:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    # Straight between the ticks around 0, where most of the front is.
    axes.set_yscale("symlog", linthresh=QUALITY_DROP, linscale=0.6)
    axes.yaxis.set_major_formatter(lambda x, _: f"{x:+g}" if x else "0")
    axes.margins(y=0.08)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel=label, ylabel="change of AP against the full cascade (percent points)")

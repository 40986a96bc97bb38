"""A plot of the Pareto front over work and over milliseconds.

AP is shown as its change from the full cascade on the same images, so that points of two halves of
the images share one axis. All milliseconds were measured in one run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from cascade_det.calibration.comparison import FULL, ComparedExits
from cascade_det.calibration.front import FrontPoint
from cascade_det.calibration.target import FAST_DROP, QUALITY_DROP
from cascade_det.files import atomic_path

_Cost = Callable[["FrontPoint | ComparedExits"], float]
_TINY = 1e-6  # Of work, on a logarithmic axis.
# Everything else is measured on the images that judge: after a free search the other half.
_TRIED = "all trials"
_BLUE, _RED = "#1b5e8c", "#c0392b"


# Entries of the legend: how names begin, label, color and shape. The first one that fits counts.
KINDS = (
    ("oracle", "oracles", "#2e8b57", "P"),
    ("random", "random", "#8a8a8a", "X"),
    (tuple("123456789"), "fewer stages or proposals", "#e08214", "v"),
    ("", "one rule", "#444444", "h"),
)


def _percent(point: FrontPoint | ComparedExits) -> float:
    return 100 * max(point.work, _TINY)


def _milliseconds(point: FrontPoint | ComparedExits) -> float:
    return float("nan") if point.milliseconds is None else point.milliseconds


def plot_front(
    front: Sequence[FrontPoint],
    path: str | os.PathLike[str],
    *,
    profiles: Mapping[str, FrontPoint],
    tried: Sequence[FrontPoint],
    compared: Sequence[ComparedExits],
    chosen: str,
    metric: str = "AP",
) -> None:
    """Draw a front as a PNG: over the work and, if any were measured, over the milliseconds.

    Args:
        front: at least one point.
        path: the PNG; its folder is made where it is missing, an old file is replaced.
        profiles: points to mark and label, by name.
        tried: all points of the search, on the images that it used.
        compared: see ``compare``; one kind of mark for each kind of exits.
        chosen: the name of ``compared`` that gets an error bar.
        metric: the AP.
    """
    panels: list[tuple[str, _Cost]] = [("work of the heads (% of the full cascade)", _percent)]
    if any(point.milliseconds is not None for point in front):
        panels.append(("time per image (ms, measured)", _milliseconds))
    figure = Figure(figsize=(7.5 * len(panels), 6.4), dpi=110, layout="constrained")
    for number, (label, cost) in enumerate(panels, start=1):
        first = figure.axes[0] if figure.axes else None
        axes = figure.add_subplot(1, len(panels), number, sharey=first)
        _draw_front(axes, cost, front, profiles, tried)
        _draw_compared(axes, cost, compared, chosen, metric)
        _format_axes(axes, label, metric, wide=cost is _percent)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_front(
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
    for index, (name, point) in enumerate(profiles.items()):
        at = cost(point), -point.drop
        label = "profile, by its name" if index == 0 else None
        axes.plot(*at, "s", ms=10, mfc="none", mec=_BLUE, mew=1.6, label=label)
        _annotate(axes, name, at, color=_BLUE, below=index % 2 == 1)


def _annotate(
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


def _draw_compared(
    axes: Axes,
    cost: _Cost,
    compared: Sequence[ComparedExits],
    chosen: str,
    metric: str,
) -> None:
    labelled = set()
    for row in compared:
        change = row.differences[metric]
        at = cost(row), change.value
        if not np.isfinite(at[0]):
            continue
        if row.name == FULL:
            axes.plot(*at, "*", color="k", ms=11, zorder=4)
            _annotate(axes, FULL, at, color="k")
        elif row.name == chosen:
            axes.errorbar(
                *at,
                [[max(change.value - change.low, 0.0)], [max(change.high - change.value, 0.0)]],
                fmt="o",
                color=_RED,
                ms=8,
                capsize=4,
                zorder=5,
                label=f"{row.name} (95 %)",
            )
        else:
            kind = next(kind for kind in KINDS if row.name.startswith(kind[0]))
            _, label, color, shape = kind
            known = kind in labelled
            labelled.add(kind)
            axes.plot(*at, shape, color=color, ms=8, mec="w", label=None if known else label)


def _format_axes(axes: Axes, label: str, metric: str, *, wide: bool) -> None:
    for drop in (0.0, QUALITY_DROP, FAST_DROP):
        axes.axhline(-drop, color="#888888", lw=0.8, ls=":" if drop else "-", zorder=0)
    if wide:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    # Linear near 0, where most of the front is.
    axes.set_yscale("symlog", linthresh=QUALITY_DROP, linscale=0.6)
    axes.yaxis.set_major_formatter(lambda x, _: f"{x:+g}" if x else "0")
    axes.margins(y=0.08)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel=label, ylabel=f"change of {metric} against the full cascade (percent points)")

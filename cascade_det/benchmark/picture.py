"""The ratios of a benchmark as a bar chart."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cascade_det.benchmark.report import BACKBONE_TITLE, TITLES, where
from cascade_det.files import atomic_path

_COLORS = ("#9ecae1", "#3182bd", "#08519c", "#a1d99b", "#31a354", "#006d2c")
_PANELS = {**TITLES, "backbones": BACKBONE_TITLE}


def plot_benchmark(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw how many times as fast ours is, one panel for each kind of comparison.

    Whiskers are quartiles; a vertical line on a bar is its target.

    Args:
        results: of ``run_benchmark``.
        path: of the PNG; an old one is replaced.
    """
    panels = {
        name: results[name][0]
        for name in _PANELS
        if results.get(name) and results[name][0]["ratios"]
    }
    rows = [max(len(comparison["ratios"]), 3) for comparison in panels.values()] or [3]
    figure = Figure(figsize=(9, 1.0 + 0.24 * sum(rows) + 0.8 * len(rows)), dpi=110)
    figure.set_layout_engine("constrained")
    if panels:
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=rows)[:, 0]
        for axes, (name, comparison) in zip(grid, panels.items(), strict=True):
            _plot(axes, comparison, _targets(results, name))
            axes.set_title(f"{_PANELS[name]}, {where(comparison)}", fontsize=10, loc="left")
        machine = results["machine"]
        figure.suptitle(f"{machine['device_name']}, {machine['threads']} threads", fontsize=10)
    else:
        figure.text(0.5, 0.5, "No baseline was measured.", ha="center", va="center")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _targets(results: Mapping[str, Any], measurement: str) -> dict[tuple[str, str], float]:
    """The targets of the first comparison of a kind, by model and baseline."""
    first = results[measurement][0]
    size = first["batch"], first.get("proposals")
    return {
        (target["contender"], target["against"]): target["least"]
        for target in results.get("bar", ())
        if target.get("measurement") == measurement
        and (target["batch"], target["proposals"]) == size
    }


def _plot(
    axes: Axes, comparison: Mapping[str, Any], targets: Mapping[tuple[str, str], float]
) -> None:
    ratios = comparison["ratios"]
    baselines = list(dict.fromkeys(entry["against"] for entry in ratios))
    owns = list(dict.fromkeys(entry["what"] for entry in ratios))
    step = 0.8 / len(owns)
    for index, own in enumerate(owns):
        entries = {entry["against"]: entry["ratio"] for entry in ratios if entry["what"] == own}
        places = [baselines.index(baseline) - 0.4 + step * (index + 0.5) for baseline in entries]
        median, low, high = (
            np.array([spread[key] for spread in entries.values()])
            for key in ("median", "low", "high")
        )
        bars = axes.barh(
            places,
            median,
            step * 0.9,
            xerr=[median - low, high - median],
            label=own,
            color=_COLORS[index % len(_COLORS)],
            error_kw={"lw": 0.8, "capsize": 1.5},
        )
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=7)
        for y, baseline in zip(places, entries, strict=True):
            if (own, baseline) in targets:
                axes.vlines(targets[own, baseline], y - step / 2, y + step / 2, color="red")
    axes.axvline(1, color="grey", lw=0.8, ls=":")
    axes.set_yticks(range(len(baselines)), baselines, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast (red: target)", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))

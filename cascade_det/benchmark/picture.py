"""The ratios of a benchmark as a bar chart."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cascade_det.files import atomic_path

_PANELS = {
    "heads": "RoI heads alone",
    "whole": "Whole model",
    "training": "Step of training",
}
_COLORS = ("#9ecae1", "#3182bd", "#08519c", "#a1d99b", "#31a354", "#006d2c")


def plot_benchmark(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw how many times as fast as each peer ours is, one panel for each kind of comparison.

    Whiskers are quartiles, and a vertical line on a bar is what is claimed of it.

    Args:
        results: of ``run.run``.
        path: of the PNG; an old one is replaced.
    """
    panels = [
        (f"{title}, {_where(comparisons[0])}", comparisons[0], _claimed(results, name))
        for name, title in _PANELS.items()
        if (comparisons := results.get(name)) and comparisons[0]["ratios"]
    ]
    rows = [max(len(comparison["ratios"]), 3) for _, comparison, _ in panels] or [3]
    figure = Figure(figsize=(9, 1.0 + 0.24 * sum(rows) + 0.8 * len(rows)), dpi=110)
    figure.set_layout_engine("constrained")
    if not panels:
        figure.text(0.5, 0.5, "No peer was measured.", ha="center", va="center")
    else:
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=rows)[:, 0]
        for axes, (title, comparison, least) in zip(grid, panels, strict=True):
            _plot(axes, title, comparison["ratios"], least)
        machine = results["machine"]
        figure.suptitle(f"{machine['device_name']}, {machine['threads']} threads", fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _claimed(results: Mapping[str, Any], measurement: str) -> dict[tuple[str, str], float]:
    """What is claimed of the first comparison of a kind, by contender and peer."""
    first = results[measurement][0]
    return {
        (claim["contender"], claim["against"]): claim["least"]
        for claim in results.get("bar", ())
        if claim.get("measurement") == measurement
        and (claim["batch"], claim["proposals"]) == (first["batch"], first.get("proposals"))
    }


def _plot(
    axes: Axes,
    title: str,
    ratios: Sequence[Mapping[str, Any]],
    least: Mapping[tuple[str, str], float],
) -> None:
    peers = list(dict.fromkeys(entry["against"] for entry in ratios))
    owns = list(dict.fromkeys(entry["what"] for entry in ratios))
    step = 0.8 / len(owns)
    for index, own in enumerate(owns):
        of_own = [entry for entry in ratios if entry["what"] == own]
        places = [peers.index(entry["against"]) - 0.4 + step * (index + 0.5) for entry in of_own]
        spreads = [entry["ratio"] for entry in of_own]
        medians = [spread["median"] for spread in spreads]
        below = [spread["median"] - spread["low"] for spread in spreads]
        above = [spread["high"] - spread["median"] for spread in spreads]
        axes.barh(
            places,
            medians,
            step * 0.9,
            xerr=(below, above),
            label=own,
            color=_COLORS[index % len(_COLORS)],
            error_kw={"lw": 0.8, "capsize": 1.5},
        )
        for place, entry in zip(places, of_own, strict=True):
            high = entry["ratio"]["high"]
            axes.annotate(
                f"{entry['ratio']['median']:.1f}",
                (high, place),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
            if (own, entry["against"]) in least:
                claimed = least[own, entry["against"]]
                axes.vlines(claimed, place - step / 2, place + step / 2, color="red")
    axes.axvline(1, color="grey", lw=0.8, ls=":")
    axes.set_yticks(range(len(peers)), peers, fontsize=8)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("times as fast (red: the bar)", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _where(comparison: Mapping[str, Any]) -> str:
    batch = f"batch of {comparison['batch']}"
    proposals = comparison.get("proposals")
    return batch if proposals is None else f"{batch}, {proposals} proposals"

"""What we claim on a CPU, beside what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cascade_det.benchmark.memory import BASELINE


@dataclass(frozen=True)
class SpeedTarget:
    """On a CPU, ours is at least this many times as fast as a baseline.

    Attributes:
        what: description.
        measurement: "heads", "whole" or "training".
        own: name of our model.
        baseline: name of the other model.
        least: the ratio.
        dtype: that of our model, if the target depends on it.
    """

    what: str
    measurement: str
    own: str
    baseline: str
    least: float
    dtype: str = ""


# Ends the description of a model whose dtype the CPU has no instructions for.
EMULATED = ", emulated: no instructions for its type"

SPEED_TARGETS = (
    SpeedTarget("RoI heads, with exits", "heads", "ours-fast-exits", "detectron2-cascade", 12.0),
    SpeedTarget(
        "RoI heads, with exits", "heads", "ours-fast-exits", "detectron2-one-stage-autocast", 5.0
    ),
    SpeedTarget("RoI heads, exits off, float32", "heads", "ours", "detectron2-cascade", 2.2),
    SpeedTarget("RoI heads, exits off, optimised", "heads", "ours-fast", "detectron2-cascade", 2.2),
    SpeedTarget("masks, float32", "masks", "ours-fast", "detectron2-cascade", 1.8, "float32"),
    SpeedTarget("masks, bfloat16", "masks", "ours-fast", "detectron2-cascade", 2.4, "bfloat16"),
)
# Peak memory relative to the baseline's, and points of AP below the plain cascade's.
_MOST_MEMORY = 1.0
_LARGEST_DROPS = {"AP": 0.1, "AP75": 0.2}


def hold_targets(
    results: Mapping[str, Any], targets: Sequence[SpeedTarget] = SPEED_TARGETS
) -> list[dict[str, Any]]:
    """The targets that were measured; those for speed and memory only on a CPU.

    Args:
        results: of ``run_benchmark``.
        targets: of speed.

    Returns:
        Rows with ``what``, ``contender``, ``against``, ``batch``, ``proposals``, ``ratio`` (of
        times a spread, of memory the quotient, of AP the difference in points), ``bar`` (the
        target in words) and, for speed, ``least`` and ``measurement``.
    """
    rows = _accuracies(results)
    if not results["machine"]["device"].startswith("cpu"):
        return list(rows)
    speeds = [row for target in targets for row in _speeds(results, target)]
    return [*speeds, *_memories(results), *rows]


def _speeds(results: Mapping[str, Any], target: SpeedTarget) -> Iterator[dict[str, Any]]:
    """The comparison with the most proposals counts."""
    measured = results.get(target.measurement)
    if not measured:
        return
    comparison = max(measured, key=lambda comparison: comparison.get("proposals") or 0)
    if target.dtype not in ("", comparison.get("dtype")):
        return
    baseline = results["contenders"].get(target.baseline, "")
    for entry in comparison["ratios"]:
        if (entry["what"], entry["against"]) == (target.own, target.baseline):
            yield {
                "what": target.what + (EMULATED if baseline.endswith(EMULATED) else ""),
                "contender": target.own,
                "against": target.baseline,
                "batch": comparison["batch"],
                "proposals": comparison.get("proposals"),
                "ratio": entry["ratio"],
                "bar": f"{target.least:g} times as fast",
                "least": target.least,
                "measurement": target.measurement,
            }


def _memories(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for measurement, measured in (results.get("memory") or {}).items():
        for name, memory in measured["contenders"].items():
            if name != BASELINE and "ratio" in memory:
                yield {
                    "what": f"peak memory, {measurement}",
                    "contender": name,
                    "against": BASELINE,
                    "batch": measured["batch"],
                    "proposals": measured.get("proposals"),
                    "ratio": memory["ratio"],
                    "bar": f"at most {_MOST_MEMORY:g} of it",
                }


def _accuracies(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    first, *others = (results.get("accuracy") or {}).get("settings") or [{}]
    for setting in others:
        for name, drop in _LARGEST_DROPS.items():
            yield {
                "what": f"{name}, points",
                "contender": setting["setting"],
                "against": first["setting"],
                "batch": None,
                "proposals": None,
                "ratio": setting[name] - first[name],
                "bar": f"within {drop:g}",
            }

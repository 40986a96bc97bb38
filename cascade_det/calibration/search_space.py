"""The exits that a calibration tries: the parameters of its search, and usual rules for comparison.

S stages, R proposals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from cascade_det.calibration.search import Setting
from cascade_det.core import ExitPolicy

TILE_THRESHOLD = "TILE_THRESHOLD"

_REDUNDANCY = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
_PRUNE = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12)
_DROPPED_SHARES = (0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9)
_PROPOSALS = (500, 300, 200, 100, 50)
_REGIONS = (200, 150, 120, 100, 70, 50, 30)
_PRUNER = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
# Confidence and localisation.
_ACCEPT = (
    (0.95, 0.95),
    (0.9, 0.95),
    (0.9, 0.92),
    (0.8, 0.92),
    (0.9, 0.9),
    (0.8, 0.9),
    (0.9, 0.85),
    (0.8, 0.85),
    (0.8, 0.8),
    (0.7, 0.7),
    (0.7, 0.0),
)


def exit_parameters(
    *,
    num_stages: int,
    objectness: npt.NDArray[np.float32],
    proposals_per_image: int,
    learned: Sequence[str],
) -> dict[str, list[Setting]]:
    """The parameters that a search varies: settings from off to risky, by name.

    Args:
        num_stages: S.
        objectness: float32 ``[R]`` in [0, 1], of the proposals of the images to search on.
        proposals_per_image: the largest number in an image.
        learned: learned parts that the model has.
    """
    gates = num_stages - 1
    first, later = ([n for n in m if n < proposals_per_image] for m in (_PROPOSALS, _REGIONS))
    parameters: dict[str, list[Setting]] = {
        "redundancy": [{}, *({"REDUNDANCY_IOU": value} for value in _REDUNDANCY)]
    }
    for s in range(gates):
        levels = _levels("PRUNE_THRESHOLDS", _PRUNE, s, gates, 0.0)
        parameters[f"pruning after stage {s}"] = levels
    thresholds = _thresholds(objectness)
    parameters["objectness"] = [{}, *({"PROPOSAL_THRESHOLD": value} for value in thresholds)]
    parameters["proposals"] = _levels("REGION_BUDGET", first, 0, num_stages, 0)
    for s in range(1, num_stages):
        parameters[f"regions in stage {s}"] = _levels("REGION_BUDGET", later, s, num_stages, 0)
    if "pruner" in learned:
        for g in range(num_stages):
            levels = _levels("PRUNER_THRESHOLDS", _PRUNER, g, num_stages, 0.0)
            parameters[f"pruner at gate {g}"] = levels
    accepted = [
        {
            "CONFIDENCE": "learned" if "gate" in learned else "max_prob",
            "THRESHOLDS": (confidence,) * gates,
            "LOCALISATION": "predicted_iou" if "iou_head" in learned else "refinement",
            "LOCALISATION_THRESHOLDS": (iou,) * gates,
        }
        for confidence, iou in _ACCEPT
    ]
    parameters["acceptance"] = [{}, *accepted]
    return parameters


# From safe to risky: background after each stage, redundancy, regions in stage 0, 1 and later; and
# the typical drop of AP, in percent points: see docs/exits.md for the data.
_Place: TypeAlias = tuple[float, float, int, int, int, float]
_FIRST: tuple[_Place, ...] = (
    (0.01, 2.0, 0, 0, 0, 0.01),
    (0.02, 2.0, 0, 0, 0, 0.018),
    (0.03, 2.0, 0, 0, 0, 0.021),
)
_BY_REDUNDANCY: tuple[_Place, ...] = (
    (0.03, 0.99, 0, 0, 0, 0.023),
    (0.03, 0.98, 0, 0, 0, 0.033),
    (0.03, 0.97, 0, 0, 0, 0.033),
    (0.04, 0.96, 0, 0, 0, 0.046),
    (0.05, 0.95, 0, 0, 0, 0.069),
    (0.05, 0.95, 0, 600, 450, 0.069),
    (0.05, 0.95, 0, 400, 300, 0.07),
    (0.05, 0.95, 0, 300, 220, 0.087),
    (0.05, 0.95, 0, 250, 180, 0.091),
    (0.05, 0.95, 0, 200, 150, 0.18),
)
_BY_BUDGETS: tuple[_Place, ...] = (
    (0.05, 2.0, 0, 0, 0, 0.021),
    (0.05, 2.0, 0, 600, 450, 0.021),
    (0.05, 2.0, 0, 450, 350, 0.021),
    (0.05, 2.0, 0, 350, 250, 0.079),
    (0.05, 2.0, 0, 300, 220, 0.079),
    (0.05, 2.0, 0, 250, 180, 0.079),
    (0.05, 2.0, 0, 220, 160, 0.079),
    (0.05, 2.0, 0, 200, 150, 0.079),
    (0.05, 2.0, 0, 175, 135, 0.09),
)
_LAST: tuple[_Place, ...] = (
    (0.05, 0.94, 0, 150, 120, 0.34),
    (0.05, 0.93, 0, 120, 100, 0.52),
    (0.05, 0.92, 0, 100, 80, 0.58),
    (0.05, 0.91, 0, 80, 70, 0.93),
    (0.05, 0.90, 300, 70, 50, 0.93),
    (0.06, 0.88, 250, 65, 45, 1.2),
    (0.07, 0.86, 200, 60, 42, 2.0),
    (0.08, 0.83, 170, 55, 38, 2.5),
    (0.10, 0.80, 150, 50, 35, 3.3),
    (0.12, 0.75, 120, 45, 32, 4.4),
    (0.12, 0.70, 100, 40, 28, 5.7),
    (0.15, 0.65, 70, 30, 20, 7.7),
    (0.20, 0.60, 45, 18, 10, 9.3),
    (0.30, 0.50, 20, 6, 3, 14.3),
)
_PATHS = tuple((*_FIRST, *middle, *_LAST) for middle in (_BY_REDUNDANCY, _BY_BUDGETS))
# Settings, and for each the percent points of AP that it loses on other data.
ExitPath: TypeAlias = tuple[list[Setting], list[float]]


def exit_paths(*, num_stages: int, proposals_per_image: int) -> list[ExitPath]:
    """Paths from the full cascade to risky exits, each setting once: redundancy or budgets first.

    Args:
        num_stages: S.
        proposals_per_image: the largest number in an image; only smaller budgets are set.
    """
    return [_path(places, num_stages, proposals_per_image) for places in _PATHS]


def _path(places: Sequence[_Place], num_stages: int, proposals_per_image: int) -> ExitPath:
    path: list[Setting] = [{}]
    drops = [0.0]
    for prune, redundancy, first, second, later, drop in places:
        setting: Setting = {}
        if num_stages > 1:
            setting["PRUNE_THRESHOLDS"] = (prune,) * (num_stages - 1)
        if redundancy <= 1:
            setting["REDUNDANCY_IOU"] = redundancy
        budgets = (first, second, *[later] * num_stages)[:num_stages]
        limits = tuple(n if n < proposals_per_image else 0 for n in budgets)
        if any(limits):
            setting["REGION_BUDGET"] = limits
        if setting != path[-1]:
            path.append(setting)
            drops.append(drop)
    return path, drops


# From safe to risky: objectness from which on a tile is open, and the typical further drop of AP.
_TILES = ((0.05, 0.01), (0.1, 0.02), (0.3, 0.06), (1.0, 1.2))
# Of a recording; 0 is the whole map.
TILE_THRESHOLDS = (0.0, *(threshold for threshold, _ in _TILES))


def tile_steps(recorded: Sequence[float]) -> tuple[list[Setting], list[float]]:
    """Settings of the tile gate from off to risky, and their typical drops in percent points.

    Args:
        recorded: tile thresholds of a recording; none without a tile gate.
    """
    known = [(threshold, drop) for threshold, drop in _TILES if threshold in recorded]
    settings: list[Setting] = [{TILE_THRESHOLD: threshold} for threshold, _ in known]
    return [{}, *settings], [0.0, *(drop for _, drop in known)]


def default_exits(num_stages: int) -> Setting:
    """The exits of ``ENABLED`` alone, for S stages."""
    return {"PRUNE_THRESHOLDS": (0.02,) * (num_stages - 1), "REDUNDANCY_IOU": 0.9}


def usual_settings(
    num_stages: int, learned: Sequence[str], *, tile_gate: bool = False
) -> dict[str, Setting]:
    """Each exit rule alone, at a usual value.

    Args:
        num_stages: S.
        learned: learned parts that the model has.
        tile_gate: whether ``TILE_THRESHOLDS`` were recorded.
    """
    gates = num_stages - 1
    accepted = {"LOCALISATION": "refinement", "LOCALISATION_THRESHOLDS": (0.9,) * gates}
    # The highest threshold that agreement can reach: all stages so far.
    patience = tuple(float(max(gate, 1)) for gate in range(gates))
    settings: dict[str, Setting] = {
        "prune < 0.02": {"PRUNE_THRESHOLDS": (0.02,) * gates},
        "prune 0.5 below 50th": {"PRUNE_MARGINS": (1.0, *(0.5,) * gates), "PRUNE_BEST": 50},
        "redundant at 0.9": {"REDUNDANCY_IOU": 0.9},
        "redundant at 0.8": {"REDUNDANCY_IOU": 0.8},
        "prune and redundant": default_exits(num_stages),
        "accept max_prob 0.9": {"THRESHOLDS": (0.9,) * gates},
        "accept max_prob, box done": {"THRESHOLDS": (0.9,) * gates, **accepted},
    }
    confidences = {"entropy": (0.7,) * gates, "margin": (0.8,) * gates, "agreement": patience}
    for name, thresholds in confidences.items():
        setting = {"THRESHOLDS": thresholds, "CONFIDENCE": name, **accepted}
        settings[f"accept {name}, box done"] = setting
    if tile_gate:
        settings["tiles from 0.1"] = {TILE_THRESHOLD: 0.1}
        settings["no tiles for the RPN"] = {TILE_THRESHOLD: 1.0}
    if "pruner" in learned:
        settings["learned pruner 0.1"] = {"PRUNER_THRESHOLDS": (0.1,) * num_stages}
    if "gate" in learned:
        settings["accept learned gate"] = {"THRESHOLDS": (0.6,) * gates, "CONFIDENCE": "learned"}
    if "iou_head" in learned:
        settings["accept max_prob, predicted IoU"] = {
            "THRESHOLDS": (0.9,) * gates,
            "LOCALISATION": "predicted_iou",
            "LOCALISATION_THRESHOLDS": (0.85,) * gates,
        }
    return settings


def truncated_cascades(num_stages: int) -> dict[str, ExitPolicy]:
    """The cascade that stops after its first stages, by name: "1 stage", "2 stages" and so on."""
    gates = range(num_stages - 1)
    return {
        f"{count} stage{'s' * (count > 1)}": ExitPolicy(
            num_stages=num_stages,
            thresholds=tuple(0.0 if gate == count - 1 else 2.0 for gate in gates),
        )
        for count in range(1, num_stages)
    }


def _thresholds(objectness: npt.NDArray[np.float32]) -> list[float]:
    """Thresholds that drop ``_DROPPED_SHARES`` of the proposals, but not none or all of them."""
    if len(objectness) == 0:
        return []
    rounded = [float(f"{value:.4g}") for value in np.quantile(objectness, _DROPPED_SHARES)]
    return [value for value in dict.fromkeys(rounded) if objectness.min() < value < 1]


def _levels(
    key: str, values: Sequence[float], index: int, length: int, off: float
) -> list[Setting]:
    """One element of a tuple, whose other elements are off."""
    tuples = (tuple(v if i == index else off for i in range(length)) for v in values)
    return [{}, *({key: value} for value in tuples)]

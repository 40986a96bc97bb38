"""The Pareto front of AP and work: its points, and a table of them."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cascade_det.calibration.latency_model import LatencyModel
from cascade_det.calibration.search import Setting
from cascade_det.calibration.trials import TrialSummary
from cascade_det.errors import CascadeDetError
from cascade_det.files import write_csv

_TINY = 1e-6  # Least work, before its logarithm.


@dataclass(frozen=True)
class FrontPoint:
    """A setting with its AP, work and time.

    Attributes:
        setting: keys of ``MODEL.CASCADE.EXIT``.
        ap: in percent.
        drop: percent points of AP below the full cascade; negative above it.
        work: share of the full cascade's FLOPs in box and mask heads.
        region_shares: share of all proposals that enters each of the S stages, 0 to 1.
        milliseconds: per image, measured; ``None`` if it was not.
        predicted: milliseconds per image by the latency model; ``None`` without one.
        chosen: whether it is the setting chosen for the target.
        masks: per image; ``None`` for a cascade without masks.
        metric: the AP.
    """

    setting: Setting
    ap: float
    drop: float
    work: float
    region_shares: tuple[float, ...]
    milliseconds: float | None = None
    predicted: float | None = None
    chosen: bool = False
    masks: float | None = None
    metric: str = "AP"


def front_point(
    setting: Setting,
    trial: TrialSummary,
    full: TrialSummary,
    latency: LatencyModel,
    *,
    chosen: bool,
    metric: str = "AP",
    has_masks: bool = False,
) -> FrontPoint:
    """A trial as a point.

    Args:
        setting: that was tried.
        trial: of the setting.
        full: of the full cascade on the same images.
        latency: predicts milliseconds.
        chosen: whether it is the setting chosen for the target.
        metric: the AP: ``AP`` or ``segm/AP``.
        has_masks: whether the cascade has masks.
    """
    ap = trial.metrics[metric]
    shares = trial.entered.sum(axis=1) / max(full.entered[0].sum(), 1)
    return FrontPoint(
        setting=setting,
        ap=ap,
        drop=full.metrics[metric] - ap,
        work=trial.work,
        region_shares=tuple(shares.tolist()),
        predicted=latency.per_image(trial.entered, trial.masks, trial.tiles),
        chosen=chosen,
        masks=float(trial.masks.mean()) if has_masks else None,
        metric=metric,
    )


def spread_out(front: Sequence[FrontPoint], most: int) -> list[FrontPoint]:
    """At most ``most`` points of a front, evenly by rank of work, with both ends."""
    by_work = sorted(front, key=lambda point: point.work)
    ranks = np.linspace(0, len(by_work) - 1, min(most, len(by_work))).round().astype(int)
    return [by_work[rank] for rank in ranks]


def choose_points(front: Sequence[FrontPoint], quality: int, fast: int) -> dict[str, FrontPoint]:
    """Three points of a front: quality, balanced and fast, by name.

    Balanced is the knee between the others: the point farthest above the straight line from quality
    to fast, over the logarithm of work, or quality if none is above it.

    Args:
        front: by falling work.
        quality: index of the point that loses at most ``QUALITY_DROP``.
        fast: the same for ``FAST_DROP``; not before ``quality``.
    """
    first, last = front[quality], front[fast]
    between = [first, *(p for p in front[quality:fast] if last.work < p.work < first.work)]
    balanced = max(between, key=lambda point: _above_chord(point, first, last))
    return {"quality": first, "balanced": balanced, "fast": last}


def write_front(front: Sequence[FrontPoint], path: str | os.PathLike[str]) -> None:
    """Write points, at least one, as CSV; settings as JSON. An old file is replaced in one step."""
    rows = [_columns(point) for point in front]
    write_csv(path, list(rows[0]), (list(row.values()) for row in rows))


def read_front(path: str | os.PathLike[str]) -> list[FrontPoint]:
    """The points of a file that :func:`write_front` wrote, in its order; values are lists.

    Raises:
        CascadeDetError: another file; the message names the row.
        OSError: it cannot be read.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise CascadeDetError(f"{path}: is not a front.csv of cascade-det calibrate") from error
    points = []
    for number, row in enumerate(rows, 2):
        try:
            points.append(_point(row))
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise CascadeDetError(
                f"{path}, line {number}: is not a row of a front.csv of cascade-det calibrate "
                f"({type(error).__name__}: {error})"
            ) from error
    if not points:
        raise CascadeDetError(f"{path}: has no rows. Give a front.csv of cascade-det calibrate.")
    return points


def _point(row: Mapping[str, str]) -> FrontPoint:
    drop = next((name for name in row if name and name.endswith(" drop")), " drop")
    metric = drop.removesuffix(" drop")
    setting = json.loads(row["setting"])
    if not isinstance(setting, dict):
        raise ValueError("the setting is not a mapping")
    stages = (row[name] for name in row if name and name.startswith("regions in stage "))
    return FrontPoint(
        setting=setting,
        ap=float(row[f"{metric} (%)"]),
        drop=float(row[drop]),
        work=float(row["head FLOPs left"]),
        region_shares=tuple(map(float, stages)),
        milliseconds=_number(row["ms/image (measured)"]),
        predicted=_number(row["ms/image (predicted)"]),
        chosen=bool(int(row["chosen"])),
        masks=_number(row.get("masks/image") or ""),
        metric=metric,
    )


def _number(text: str) -> float | None:
    return float(text) if text else None


def _columns(point: FrontPoint) -> dict[str, Any]:
    shares = enumerate(point.region_shares)
    return {
        f"{point.metric} (%)": point.ap,
        f"{point.metric} drop": point.drop,
        "head FLOPs left": point.work,
        **{f"regions in stage {stage}": share for stage, share in shares},
        **({} if point.masks is None else {"masks/image": point.masks}),
        "ms/image (predicted)": point.predicted,
        "ms/image (measured)": point.milliseconds,
        "chosen": int(point.chosen),
        "setting": json.dumps(point.setting),
    }


def _above_chord(point: FrontPoint, quality: FrontPoint, fast: FrontPoint) -> float:
    """AP of a point above the straight line from quality to fast, at the same work."""
    x, left, right = (np.log(max(p.work, _TINY)) for p in (point, fast, quality))
    share = (x - left) / (right - left) if right > left else 1.0
    return float(fast.drop + share * (quality.drop - fast.drop) - point.drop)

"""Exits next to simpler baselines, random exits and oracles, all from one recording.

N images, S stages.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tabulate import tabulate

from cascade_det.calibration.bootstrap import BOOTSTRAP_ROUNDS, Difference
from cascade_det.calibration.oracles import drop_oracle, outcome_oracle, random_exits
from cascade_det.calibration.progress import progress_bar
from cascade_det.calibration.search_space import truncated_cascades
from cascade_det.calibration.trials import SEGM, ExitTrials, Policies, Trial
from cascade_det.core.exits import ExitPolicy
from cascade_det.files import write_csv

FULL = "full cascade"
PROPOSALS = (300, 100, 50)
_METRICS = ("AP", "AP50", "AP75", "AP90")


@dataclass(frozen=True)
class ComparedExits:
    """One row of the comparison.

    Attributes:
        name: of the policy or baseline.
        metrics: in percent, see ``TrialSummary``.
        differences: of each metric from the full cascade, in percent points.
        entered: S numbers of regions per image that enter each stage.
        later_skipped: share of the regions of stage 1 and later that are not computed, 0 to 1.
        regions_left: share of all region-stages that are computed, 0 to 1.
        work: share of the FLOPs of the full cascade's box and mask heads that is computed.
        gigaflops: of the box and mask heads, per image, in 10^9 multiply-adds.
        lost: mean share of the full cascade's true positives of an image that are not found.
        milliseconds: per image; ``None`` if it was not measured.
        masks: per image; ``None`` for a cascade without masks.
        mask_gigaflops: the part of ``gigaflops`` in mask heads.
        mask_milliseconds: the part of ``milliseconds`` in mask heads.
    """

    name: str
    metrics: dict[str, float]
    differences: dict[str, Difference]
    entered: tuple[float, ...]
    later_skipped: float
    regions_left: float
    work: float
    gigaflops: float
    lost: float
    milliseconds: float | None = None
    masks: float | None = None
    mask_gigaflops: float = 0.0
    mask_milliseconds: float | None = None


def compare(
    trials: ExitTrials,
    policies: Mapping[str, Policies],
    milliseconds: Mapping[str, float],
    mask_milliseconds: Mapping[str, float] | None = None,
    *,
    rounds: int = BOOTSTRAP_ROUNDS,
) -> list[ComparedExits]:
    """Try the full cascade and other policies on the same images.

    Args:
        trials: of the images.
        policies: by name, see ``baselines``.
        milliseconds: per image, by name, of policies that were measured.
        mask_milliseconds: the part of them in mask heads.
        rounds: of the bootstrap.

    Returns:
        The full cascade first, then the policies.
    """
    full, images, recorded = trials.full, trials.full.entered.shape[1], trials.recording.masks
    rows = []
    with progress_bar("Comparing", 1 + len(policies)) as step:
        for name, policy in {FULL: None, **policies}.items():
            trial = trials.replay(policy)
            row = ComparedExits(
                name=name,
                metrics=trial.metrics,
                differences=trial.differences(full, rounds=rounds),
                entered=tuple((trial.entered.sum(axis=1) / images).tolist()),
                later_skipped=trial.exit_rate(full),
                regions_left=trial.regions_left(full),
                work=trial.work,
                gigaflops=trials.gigaflops(trial),
                lost=float(trial.lost.mean()),
                milliseconds=milliseconds.get(name),
                masks=None if recorded is None else float(trial.masks.mean()),
                mask_gigaflops=0.0
                if recorded is None
                else trial.masks.mean() * recorded.flops / 1e9,
                mask_milliseconds=(mask_milliseconds or {}).get(name),
            )
            rows.append(row)
            step()
    return rows


def simple_baselines(num_stages: int, most_proposals: int) -> dict[str, ExitPolicy]:
    """Policies by name: the first stages alone, and the best proposals by objectness.

    Args:
        num_stages: S.
        most_proposals: the largest number in an image; only smaller budgets are given.
    """
    budgets = {
        f"{most} proposals": ExitPolicy(
            num_stages=num_stages, region_budget=(most, *[0] * (num_stages - 1))
        )
        for most in PROPOSALS
        if most < most_proposals
    }
    return {**truncated_cascades(num_stages), **budgets}


def baselines(trials: ExitTrials, like: Trial) -> dict[str, Policies]:
    """Policies by name that exits are compared with.

    They are the ``simple_baselines``; random regions, as many at each gate as exit in another trial
    ("random exits" are reported, "random drops" are not); and oracles, see ``drop_oracle`` and
    ``outcome_oracle``.

    Args:
        trials: of the images.
        like: the other trial, of the same images.
    """
    records = trials.recording.records
    entered = trials.full.entered
    shares = (like.entered.sum(axis=1) / max(entered[0].sum(), 1)).tolist()
    before = {"before_stages": True}
    return {
        **simple_baselines(len(entered), trials.recording.most_proposals),
        "random exits": [random_exits(record, shares, accept=True) for record in records],
        "random drops": [random_exits(record, shares, accept=False) for record in records],
        "oracle of drops": [drop_oracle(record) for record in records],
        "oracle of drops before stage 0": [drop_oracle(record, **before) for record in records],
        "oracle": _outcome_oracles(trials),
        "oracle, drops before stage 0": _outcome_oracles(trials, **before),
    }


def _outcome_oracles(trials: ExitTrials, *, before_stages: bool = False) -> list[ExitPolicy]:
    recording = trials.recording
    images = zip(recording.image_ids, recording.frames, strict=True)
    oracles = []
    for record in recording.records:
        own = [next(images) for _ in range(record.num_images)]
        objects = [trials.matcher.objects_of(image_id) for image_id, _ in own]
        frames = [frame for _, frame in own]
        oracles.append(outcome_oracle(record, objects, frames, before_stages=before_stages))
    return oracles


def format_comparison(rows: Sequence[ComparedExits]) -> str:
    """The comparison as plain text; in percent except regions, GFLOPs and milliseconds."""
    cells = [_cells(row) for row in rows]
    aligned = ("left", *["right"] * (len(cells[0]) - 1))
    return tabulate(cells, headers="keys", colalign=aligned, disable_numparse=True)


def _cells(row: ComparedExits) -> dict[str, str]:
    change = row.differences["AP"]
    return {
        "exits": row.name,
        **{name: f"{row.metrics[name]:.2f}" for name in _METRICS},
        "AP change\n[95 %]": _interval(change),
        **_mask_cells(row),
        "regions/image\nin each stage": " / ".join(f"{number:.0f}" for number in row.entered),
        "later work\nskipped": f"{100 * row.later_skipped:.1f}",
        "region-stages\nleft": f"{100 * row.regions_left:.1f}",
        "head\nGFLOPs": f"{row.gigaflops:.3f}",
        "ms/image": "" if row.milliseconds is None else f"{row.milliseconds:.1f}",
        "lost": f"{100 * row.lost:.2f}",
    }


def _mask_cells(row: ComparedExits) -> dict[str, str]:
    if row.masks is None:
        return {}
    cells = {
        "masks/\nimage": f"{row.masks:.1f}",
        "mask\nGFLOPs": f"{row.mask_gigaflops:.3f}",
        "mask\nms": "" if row.mask_milliseconds is None else f"{row.mask_milliseconds:.1f}",
    }
    if change := row.differences.get("segm/AP"):
        cells["segm\nAP"] = f"{row.metrics['segm/AP']:.2f}"
        cells["segm AP change\n[95 %]"] = _interval(change)
    return cells


def _interval(change: Difference) -> str:
    return f"{change.value:+.2f} [{change.low:+.2f}, {change.high:+.2f}]"


def write_comparison(rows: Sequence[ComparedExits], path: str | os.PathLike[str]) -> None:
    """Write the comparison as CSV; an old file is replaced in one step."""
    columns = [_columns(row) for row in rows]
    write_csv(path, list(columns[0]), (list(row.values()) for row in columns))


def _columns(row: ComparedExits) -> dict[str, str | float | None]:
    change = row.differences["AP"]
    return {
        "exits": row.name,
        **{f"{name} (%)": row.metrics[name] for name in _METRICS},
        "AP change": change.value,
        "AP change low": change.low,
        "AP change high": change.high,
        "AP change deviation": change.deviation,
        **{f"{name} change": row.differences[name].value for name in _METRICS[1:]},
        **{f"regions/image in stage {stage}": number for stage, number in enumerate(row.entered)},
        "later work skipped": row.later_skipped,
        "region-stages left": row.regions_left,
        "head FLOPs left": row.work,
        "head GFLOPs/image": row.gigaflops,
        "ms/image": row.milliseconds,
        "lost": row.lost,
        **_mask_columns(row),
    }


def _mask_columns(row: ComparedExits) -> dict[str, float | None]:
    if row.masks is None:
        return {}
    columns = {
        "masks/image": row.masks,
        "mask GFLOPs/image": row.mask_gigaflops,
        "mask ms/image": row.mask_milliseconds,
    }
    change = row.differences.get("segm/AP")
    if change is None:
        return columns
    return {
        **columns,
        **{f"{SEGM}{name} (%)": row.metrics[SEGM + name] for name in _METRICS},
        "segm/AP change": change.value,
        "segm/AP change low": change.low,
        "segm/AP change high": change.high,
        "segm/AP change deviation": change.deviation,
        **{f"{SEGM}{name} change": row.differences[SEGM + name].value for name in _METRICS[1:]},
    }

"""Exits next to simpler baselines, random exits and oracles, all from one recording.

N images, S stages.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tabulate import tabulate

from cascade_det.calibration.bootstrap import Difference, paired_bootstrap
from cascade_det.calibration.oracles import drop_oracle, outcome_oracle, random_exits
from cascade_det.calibration.trials import ExitTrials, Policies, Trial
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
        metrics: ``AP``, ``AP50``, ``AP75`` and ``AP90`` in percent.
        differences: of each metric from the full cascade, in percent points.
        entered: S numbers of regions per image that enter each stage.
        later_skipped: share of the regions of stage 1 and later that are not computed, 0 to 1.
        regions_left: share of all region-stages that are computed, 0 to 1.
        work: share of the FLOPs of all box heads that is computed, 0 to 1.
        gigaflops: of the box heads, per image, in 10^9 multiply-adds.
        lost: mean share of the full cascade's true positives of an image that are not found.
        milliseconds: per image; ``None`` if it was not measured.
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


def compare(
    trials: ExitTrials,
    policies: Mapping[str, Policies],
    *,
    chosen: str | None = None,
    milliseconds: Mapping[str, float] | None = None,
    rounds: int = 300,
    seed: int = 0,
    on_row: Callable[[], object] = lambda: None,
) -> list[ComparedExits]:
    """Try policies and baselines on the same images.

    The baselines are the full cascade, its first stages alone ("1 stage", "2 stages"), fewer
    proposals ("300 proposals" and so on, the best by objectness), random regions, as many at each
    gate as exit with the chosen policy ("random exits" are reported, "random drops" are not), and
    oracles: see ``drop_oracle`` and ``outcome_oracle``.

    Args:
        trials: of the images.
        policies: by name.
        chosen: the policy whose numbers of exits the random baselines have; by default the first.
        milliseconds: per image, by name, of policies and baselines that were measured.
        rounds: of the bootstrap.
        seed: of the bootstrap and of the random baselines.
        on_row: called after each row, since a bootstrap takes seconds.

    Returns:
        The full cascade first, then the policies, then the other baselines.
    """
    times = milliseconds or {}
    rows = []
    for name, trial in _trials(trials, policies, chosen, seed):
        differences = paired_bootstrap(trials.full.matched, trial.matched, rounds=rounds, seed=seed)
        rows.append(_row(name, trial, trials, differences, times.get(name)))
        on_row()
    return rows


def budget(most: int, num_stages: int) -> ExitPolicy:
    """The best proposals by objectness alone, at most ``most`` of each image."""
    return ExitPolicy(num_stages=num_stages, region_budget=(most, *[0] * (num_stages - 1)))


def format_comparison(rows: Sequence[ComparedExits]) -> str:
    """The comparison as plain text; in percent except regions, GFLOPs and milliseconds."""
    headers = [
        "exits",
        *_METRICS,
        "AP change\n[95 %]",
        "regions/image\nin each stage",
        "later work\nskipped",
        "region-stages\nleft",
        "head\nGFLOPs",
        "ms/image",
        "lost",
    ]
    cells = [
        [
            row.name,
            *(f"{row.metrics[name]:.2f}" for name in _METRICS),
            _interval(row.differences["AP"]),
            " / ".join(f"{number:.0f}" for number in row.entered),
            f"{100 * row.later_skipped:.1f}",
            f"{100 * row.regions_left:.1f}",
            f"{row.gigaflops:.3f}",
            "" if row.milliseconds is None else f"{row.milliseconds:.1f}",
            f"{100 * row.lost:.2f}",
        ]
        for row in rows
    ]
    aligned = ("left", *["right"] * (len(headers) - 1))
    return tabulate(cells, headers=headers, colalign=aligned, disable_numparse=True)


def write_comparison(rows: Sequence[ComparedExits], path: str | os.PathLike[str]) -> None:
    """Write the comparison as CSV; an old file is replaced in one step."""
    stages = range(len(rows[0].entered)) if rows else ()
    headers = [
        "exits",
        *(f"{name} (%)" for name in _METRICS),
        "AP change",
        "AP change low",
        "AP change high",
        "AP change deviation",
        *(f"{name} change" for name in _METRICS[1:]),
        *(f"regions/image in stage {stage}" for stage in stages),
        "later work skipped",
        "region-stages left",
        "head FLOPs left",
        "head GFLOPs/image",
        "ms/image",
        "lost",
    ]
    write_csv(path, headers, (_cells(row) for row in rows))


def _cells(row: ComparedExits) -> list[str | float | None]:
    change = row.differences["AP"]
    return [
        row.name,
        *(row.metrics[name] for name in _METRICS),
        change.value,
        change.low,
        change.high,
        change.deviation,
        *(row.differences[name].value for name in _METRICS[1:]),
        *row.entered,
        row.later_skipped,
        row.regions_left,
        row.work,
        row.gigaflops,
        row.milliseconds,
        row.lost,
    ]


def _trials(
    trials: ExitTrials, policies: Mapping[str, Policies], chosen: str | None, seed: int
) -> Iterator[tuple[str, Trial]]:
    records = trials.recording.records
    num_stages = len(trials.full.entered)
    yield FULL, trials.full
    tried = {name: trials.replay(policy) for name, policy in policies.items()}
    yield from tried.items()
    for count in range(1, num_stages):
        yield f"{count} stage{'s' * (count > 1)}", trials.replay(None, count)
    for most in PROPOSALS:
        if most < trials.full.entered[0].max(initial=0):
            yield f"{most} proposals", trials.replay(budget(most, num_stages))
    if tried:
        like = tried[chosen or next(iter(tried))].entered.sum(axis=1)
        shares = (like / max(trials.full.entered[0].sum(), 1)).tolist()
        for name, accept in (("random exits", True), ("random drops", False)):
            at_random = [random_exits(r, shares, accept=accept, seed=seed) for r in records]
            yield name, trials.replay(at_random)
    for suffix, before in (("", False), (" before stage 0", True)):
        oracle = [drop_oracle(record, before_stages=before) for record in records]
        yield f"oracle of drops{suffix}", trials.replay(oracle)
    for suffix, before in (("", False), (", drops before stage 0", True)):
        yield f"oracle{suffix}", trials.replay(_outcome_oracles(trials, before_stages=before))


def _outcome_oracles(trials: ExitTrials, *, before_stages: bool) -> list[ExitPolicy]:
    recording = trials.recording
    images = zip(recording.image_ids, recording.frames, strict=True)
    oracles = []
    for record in recording.records:
        own = [next(images) for _ in range(record.num_images)]
        objects = [trials.matcher.objects_of(image_id) for image_id, _ in own]
        frames = [frame for _, frame in own]
        oracles.append(outcome_oracle(record, objects, frames, before_stages=before_stages))
    return oracles


def _row(
    name: str,
    trial: Trial,
    trials: ExitTrials,
    differences: dict[str, Difference],
    milliseconds: float | None,
) -> ComparedExits:
    images = max(trial.entered.shape[1], 1)
    by_stage = trial.entered.sum(axis=1)
    flops = float(by_stage @ np.asarray(trials.recording.stage_flops))
    return ComparedExits(
        name=name,
        metrics=trial.metrics,
        differences=differences,
        entered=tuple((by_stage / images).tolist()),
        later_skipped=trial.exit_rate(trials.full),
        regions_left=trial.regions_left(trials.full),
        work=trial.work,
        gigaflops=flops / images / 1e9,
        lost=float(trial.lost.mean()),
        milliseconds=milliseconds,
    )


def _interval(difference: Difference) -> str:
    return f"{difference.value:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"

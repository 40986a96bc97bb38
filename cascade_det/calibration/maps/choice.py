"""Chooses exits of maps on one half of the images and reports them on the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cascade_det.calibration.bootstrap import Difference
from cascade_det.calibration.maps.runs import FULL, Run
from cascade_det.calibration.maps.scores import Scorer
from cascade_det.calibration.maps.search import Setting
from cascade_det.calibration.risk_control import fixed_sequence
from cascade_det.calibration.target import Target
from cascade_det.errors import ConfigError


@dataclass(frozen=True)
class MapRow:
    """A decoder on the images that report.

    Attributes:
        name: of the decoder.
        score: the metric in percent.
        change: percent points of it above the whole decoder.
        decoder_ms: milliseconds of the decoder per image, mean.
        total_ms: of the whole model.
        decoder_share: of the whole decoder's milliseconds.
        total_share: of the whole model's milliseconds.
        computed: share of the images or patches that a later level is computed for, 0 to 1.
        lost: mean share of the whole decoder's right pixels that are wrong, 0 to 1.
    """

    name: str
    score: float
    change: Difference
    decoder_ms: float
    total_ms: float
    decoder_share: Difference
    total_share: Difference
    computed: float
    lost: float


@dataclass(frozen=True)
class Choice:
    """The result of a calibration.

    Attributes:
        name: of the chosen setting; ``FULL`` for no exits.
        setting: ``None`` for no exits.
        rows: every decoder on the second half, the whole one first.
        metric: of the scores.
        images: number of them in each half.
        missed: why the chosen setting was rejected on the second half; "" if it was not.
    """

    name: str
    setting: Setting | None
    rows: list[MapRow]
    metric: str
    images: tuple[int, int]
    missed: str = ""


def choose(
    runs: Mapping[str, Run],
    settings: Mapping[str, Setting],
    halves: Sequence[Sequence[int]],
    scorers: Sequence[Scorer],
    target: Target,
) -> Choice:
    """Choose a setting for a target.

    Args:
        runs: of all decoders by name, see ``run_decoders``.
        settings: exits to choose from, by name.
        halves: indices of the images that choose and that report.
        scorers: of each half.
        target: the goal.

    Raises:
        ConfigError: no setting reaches the target.
    """
    first, second = ({name: run.of(half) for name, run in runs.items()} for half in halves)
    rows = [_row(name, run, second[FULL], scorers[1]) for name, run in second.items()]
    by_name = {row.name: row for row in rows}
    names = [FULL, *settings]
    missed = ""
    if target.risk is not None:
        # Safe to risky, each cheaper than the one before; the whole decoder needs no test.
        order = [FULL]
        for name in sorted(settings, key=lambda name: first[name].lost.mean()):
            if first[name].decoder_ms.mean() < first[order[-1]].decoder_ms.mean():
                order.append(name)
        # The images of a group are not independent of each other; groups are.
        losses = (scorers[1].of_groups(second[name].lost) for name in order)
        name = order[fixed_sequence(losses, target.risk, target.delta)]
    elif target.max_ap_drop is not None:
        name = _least_time(names, first, scorers[0], target.max_ap_drop)
        change = by_name[name].change
        if -change.value > target.max_ap_drop:
            missed = (
                f"On the held-out images {name!r} loses {-change.value:.2f} points of "
                f"{scorers[0].metric} (95 %: {-change.high:.2f} to {-change.low:.2f}), not at most "
                f"{target.max_ap_drop:g}: exits.yaml has no exits. Calibrate on more images, or "
                "allow a larger drop."
            )
            name = FULL
    else:
        if target.latency_ms is not None:
            good = [n for n in names if first[n].total_ms.mean() <= target.latency_ms]
            wanted = f"--latency-ms {target.latency_ms:g}"
        else:
            assert target.exit_rate is not None
            good = [n for n in names if 1 - first[n].computed >= target.exit_rate]
            wanted = f"--exit-rate {target.exit_rate:g}"
        if not good:
            fastest = min(first[n].total_ms.mean() for n in names)
            least = min(first[n].computed for n in names)
            raise ConfigError(
                f"{wanted}: no setting that was run reaches it. The fastest takes {fastest:.1f} ms "
                f"per image, the one with most exits skips {1 - least:.2f} of the later levels."
            )
        name = max(good, key=lambda n: scorers[0].score(first[n].counts))
    return Choice(
        name,
        settings.get(name),
        rows,
        scorers[0].metric,
        (len(halves[0]), len(halves[1])),
        missed,
    )


def _least_time(
    names: Sequence[str], runs: Mapping[str, Run], scorer: Scorer, most_drop: float
) -> str:
    """The fastest decoder whose drop, with one deviation of it, is small enough."""
    good = [FULL]
    for name in names[1:]:
        change = scorer.difference(runs[FULL].counts, runs[name].counts)
        if -change.value + change.deviation <= most_drop:
            good.append(name)
    return min(good, key=lambda name: runs[name].decoder_ms.mean())


def _row(name: str, run: Run, full: Run, scorer: Scorer) -> MapRow:
    return MapRow(
        name=name,
        score=scorer.score(run.counts),
        change=scorer.difference(full.counts, run.counts),
        decoder_ms=float(run.decoder_ms.mean()),
        total_ms=float(run.total_ms.mean()),
        decoder_share=scorer.ratio(run.decoder_ms, full.decoder_ms),
        total_share=scorer.ratio(run.total_ms, full.total_ms),
        computed=run.computed,
        lost=float(run.lost.mean()),
    )

"""Milliseconds per image of every part of a detector."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median
from typing import Any

import numpy as np

from cascade_det.core.structures import CascadeStats, DetectorOutput
from cascade_det.data.samples import Sample
from cascade_det.evaluation.evaluator import Evaluator
from cascade_det.report.tables import part_order
from cascade_det.segmentation.output import SegmenterStats

# Times of a second pass without exits, if the detector made one.
_FULL_PREFIX = "full/"
_LATER_STAGE = re.compile(r"stage[1-9]\d*")
_STAGE = re.compile(r"stage\d+")
_GATE = re.compile(r"gate\d+")
_GATE_OR_STAGE = re.compile(r"(gate|stage)\d+")
_MASKS_OF_STAGE = re.compile(r"masks\d+")
_NOT_TIMED_IN_FULL = (
    "The most that exits could save is unknown: the cascade was only timed with exits. Run the "
    "detector with stages=True."
)
_COSTLY_GATE = (
    "The exits {place} take {cost:.3g} ms per image, and the regions that leave there would take "
    "{saving:.3g} ms in the stages after them: MODEL.CASCADE.EXIT.GATES_OFF [{gate}] is faster "
    "here."
)
_COSTLY_TILES = (
    "With the tile gate, finest map and RPN take {gated:.3g} ms per image, and {whole:.3g} ms "
    "without: MODEL.CASCADE.EXIT.TILE_THRESHOLD 0 is faster here."
)
_SEVERAL_PROCESSES = (
    "Times are of {} processes that ran at once: if they share a processor, each is slower than "
    "one process alone."
)

Times = dict[str, float]


@dataclass(frozen=True)
class _Batch:
    """One measurement.

    Attributes:
        times: milliseconds per image of the detector as configured, by part.
        full: the same without exits. A second pass replaces the stages and what it timed.
        has_full: whether there was a second pass.
        size: number of images.
        input_sizes: height and width of each image in pixels.
        left: S shares of all regions, those that exited before stage 0 and after each stage but
            the last.
    """

    times: Times
    full: Times
    has_full: bool
    size: int
    input_sizes: list[tuple[int, int]]
    left: list[float]


class LatencyEvaluator(Evaluator):
    """Median and 95th percentile of the time of each part, after a warm-up.

    One batch is one measurement: its milliseconds divided by its images. A part that did not
    run for a batch, such as a stage that no region reached, took 0 ms there.

    Args:
        warmup: number of batches left out at the beginning of every process.
    """

    def __init__(self, warmup: int = 5) -> None:
        self._warmup = warmup
        self.reset()

    def reset(self) -> None:
        """Discard everything that was processed."""
        # By process, since each one warms up.
        self._batches: list[list[_Batch]] = [[]]

    def process(self, batch: Sequence[Sample], output: DetectorOutput) -> None:
        """Add the times of one batch; a batch without times is ignored."""
        milliseconds = output.stats.milliseconds
        if not milliseconds or not batch:
            return
        times: Times = {}
        second: Times = {}
        for part, time in milliseconds.items():
            passed = second if part.startswith(_FULL_PREFIX) else times
            # The masks of earlier stages are made for AP per stage alone; the last ones stay.
            name = _MASKS_OF_STAGE.sub("masks", part.removeprefix(_FULL_PREFIX))
            passed[name] = time / len(batch)
        replaced = _GATE_OR_STAGE if second else _GATE  # the full cascade has no gates
        kept = {p: ms for p, ms in times.items() if not replaced.fullmatch(p)}
        measured = _Batch(
            times=times,
            full=kept | second,
            has_full=bool(second),
            size=len(batch),
            input_sizes=[_size(sample) for sample in batch if "image" in sample],
            left=_left_shares(output.stats),
        )
        self._batches[-1].append(measured)

    def state(self) -> list[_Batch]:
        """The measurements, in order."""
        return list(chain(*self._batches))

    def merge(self, states: Sequence[list[_Batch]]) -> None:
        """Continue from the states of all processes, each with its own warm-up."""
        self._batches = [list(state) for state in states]

    def evaluate(self) -> dict[str, Any]:
        """``{"latency": {...}}``, all times in milliseconds per image.

        ``parts`` and ``total`` hold ``median_ms`` and ``p95_ms`` of the detector as configured;
        ``full_parts`` and ``full_total`` the same without exits, if that was timed.
        ``most_exits_could_save`` is ``(t_full - t_stage1) / t_full``, where ``t_full`` is the
        median time without exits and ``t_stage1`` the same without the second and later stages;
        nan if only a cascade with exits, or no stage, was timed. The exits are parts of their own,
        ``gate<g>`` before ``stage<g>``, and the full cascade has none. ``tile gate`` is the finest
        map, if that is computed in tiles, and in the full cascade the whole map. ``batch_size``,
        ``images``, ``batches``, ``warmup_batches`` and ``input_size`` (median of the network's
        input in pixels) describe the measurement, ``notes`` are warnings.
        """
        recorded = list(chain(*self._batches))
        if not recorded:
            warning = "No times were recorded: run the detector with a timer."
            return {"latency": {"images": 0, "batches": 0, "notes": [warning]}}
        warm = list(chain(*(batches[self._warmup :] for batches in self._batches)))
        batches = warm or recorded
        sizes = [batch.size for batch in batches]
        metrics: dict[str, Any] = {
            # The most common size, since the last batch may be smaller.
            "batch_size": Counter(sizes).most_common(1)[0][0],
            "images": sum(sizes),
            "batches": len(batches),
            "warmup_batches": len(recorded) - len(batches),
            **_input_size(batch.input_sizes for batch in batches),
            **_times_of("parts", "total", [batch.times for batch in batches]),
        }
        warnings = [] if warm else [_too_few(len(batches), self._warmup)]
        if len(self._batches) > 1:
            warnings.append(_SEVERAL_PROCESSES.format(len(self._batches)))
        full = [batch.full for batch in batches]
        was_timed = any(batch.has_full for batch in batches)
        if was_timed:
            metrics |= _times_of("full_parts", "full_total", full)
            warnings += [*_costly_gates(batches), *_costly_tiles(batches)]
        if was_timed or not any(any(batch.left) for batch in recorded):
            metrics["most_exits_could_save"] = _largest_saving(full)
        else:
            metrics["most_exits_could_save"] = float("nan")
            warnings.append(_NOT_TIMED_IN_FULL)
        return {"latency": {**metrics, "notes": warnings}}


def _left_shares(stats: CascadeStats | SegmenterStats) -> list[float]:
    before: list[Mapping[str, int]] = [getattr(stats, "left_before", {})]
    left = [*before, *stats.left]
    total = sum(sum(one.values()) for one in left) or 1
    early = (sum(n for reason, n in one.items() if reason != "completed") for one in left[:-1])
    return [count / total for count in early]


def _costly_gates(batches: Sequence[_Batch]) -> list[str]:
    """A sentence for each gate that takes longer than the stages would take for what left there."""
    found = []
    for gate in range(max((len(batch.left) for batch in batches), default=0)):
        cost = median(batch.times.get(f"gate{gate}", 0.0) for batch in batches)
        saving = median(_time_saved(batch, gate) for batch in batches)
        if cost > saving:
            place = f"after stage {gate - 1}" if gate else "before stage 0"
            found.append(_COSTLY_GATE.format(place=place, cost=cost, saving=saving, gate=gate))
    return found


def _costly_tiles(batches: Sequence[_Batch]) -> list[str]:
    """A sentence if the finest map and the RPN take longer in tiles than as a whole."""
    if not any("tile gate" in batch.times for batch in batches):
        return []
    gated, whole = (
        median(sum(one.get(part, 0.0) for part in ("tile gate", "rpn")) for one in times)
        for times in ([batch.times for batch in batches], [batch.full for batch in batches])
    )
    return [_COSTLY_TILES.format(gated=gated, whole=whole)] if gated > whole else []


def _time_saved(batch: _Batch, gate: int) -> float:
    """The share of the later stages' full time that the regions leaving at a gate would take."""
    if gate >= len(batch.left):
        return 0.0
    later = [ms for part, ms in batch.full.items() if _is_stage(part, at_least=gate)]
    return batch.left[gate] * sum(later)


def _is_stage(part: str, *, at_least: int) -> bool:
    return bool(_STAGE.fullmatch(part)) and int(part.removeprefix("stage")) >= at_least


def _largest_saving(times: Sequence[Times]) -> float:
    if not any(_STAGE.fullmatch(part) for batch in times for part in batch):
        return float("nan")
    t_full = median(sum(batch.values()) for batch in times)
    t_stage1 = median(
        sum(time for part, time in batch.items() if not _LATER_STAGE.fullmatch(part))
        for batch in times
    )
    return (t_full - t_stage1) / t_full if t_full else float("nan")


def _times_of(parts_key: str, total_key: str, times: Sequence[Times]) -> dict[str, Any]:
    parts = sorted({part for batch in times for part in batch}, key=part_order)
    return {
        parts_key: {part: _percentiles(batch.get(part, 0.0) for batch in times) for part in parts},
        total_key: _percentiles(sum(batch.values()) for batch in times),
    }


def _percentiles(times: Iterable[float]) -> dict[str, float]:
    values = list(times)
    return {"median_ms": median(values), "p95_ms": float(np.percentile(values, 95))}


def _size(sample: Mapping[str, Any]) -> tuple[int, int]:
    height, width = sample["image"].shape[-2:]
    return int(height), int(width)


def _input_size(sizes_per_batch: Iterable[list[tuple[int, int]]]) -> dict[str, Any]:
    sizes = [size for sizes in sizes_per_batch for size in sizes]
    if not sizes:
        return {}
    heights, widths = zip(*sizes, strict=True)
    return {"input_size": {"height": median(heights), "width": median(widths)}}


def _too_few(batches: int, warmup: int) -> str:
    return (
        f"Only {batches} batches were timed, no more than the {warmup} for warming up: all of "
        "them count, including the first ones."
    )

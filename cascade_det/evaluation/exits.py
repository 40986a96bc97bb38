"""Exit rates: regions per stage, the reasons of their exits, and the FLOPs of the box heads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from cascade_det.core.exits import REPORTED_REASONS
from cascade_det.core.structures import EXIT_REASONS, CascadeStats, DetectorOutput
from cascade_det.data.samples import Sample
from cascade_det.evaluation.evaluator import Evaluator

_REPORTED = (*REPORTED_REASONS, "completed")
_GIGA = 1e9


@dataclass(frozen=True)
class RegionFlops:
    """Multiply-adds of the box heads for one region.

    Attributes:
        stages: of each stage.
        scores: of its final scores if it exits after each stage, in addition to the stages.
    """

    stages: tuple[float, ...]
    scores: tuple[float, ...]


@dataclass
class _Left:
    """Regions that exited at one gate, by reason."""

    counts: Counter[str] = field(default_factory=Counter)
    # Exact sums: they are the same for any number of processes and any order of images.
    scores: dict[str, Fraction] = field(default_factory=dict)

    def add(self, counts: Mapping[str, int], scores: Mapping[str, float | Fraction]) -> None:
        self.counts.update(counts)
        for reason, total in scores.items():
            self.scores[reason] = self.scores.get(reason, Fraction(0)) + Fraction(total)

    def early(self) -> int:
        return self.counts.total() - self.counts["completed"]


class ExitEvaluator(Evaluator):
    """Sums the exit statistics of a cascade over a data set.

    Args:
        flops: of one region; ``None`` leaves out the FLOPs.
    """

    def __init__(self, flops: RegionFlops | None = None) -> None:
        self._flops = flops
        self.reset()

    def reset(self) -> None:
        """Discard everything that was processed."""
        self._num_images = self._num_batches = self._proposed = self._num_overruns = 0
        self._longest_overrun = 0.0
        self._before = _Left()
        self._entered: list[int] = []
        self._left: list[_Left] = []

    def process(self, batch: Sequence[Sample], output: DetectorOutput) -> None:
        """Add the counts of one batch.

        Raises:
            ValueError: the number of stages differs from that of the batches before.
        """
        self._add(_state_of(len(batch), output.stats))

    def state(self) -> dict[str, Any]:
        """Counts and sums, as plain numbers and fractions."""
        return {
            "images": self._num_images,
            "batches": self._num_batches,
            "proposed": self._proposed,
            "left_before": dict(self._before.counts),
            "entered": self._entered,
            "left": [dict(left.counts) for left in self._left],
            "scores": [dict(left.scores) for left in self._left],
            "overruns": self._num_overruns,
            "longest_overrun": self._longest_overrun,
        }

    def merge(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue from the states of all processes.

        Raises:
            ValueError: the number of stages differs between two that saw images.
        """
        self.reset()
        for state in states:
            if state["images"]:
                self._add(state)

    def evaluate(self) -> dict[str, Any]:
        """``{"exits": {"images": n, "stages_per_region": m, "proposals": {...}, "stage0": ...}}``.

        ``proposals`` and each stage have ``entered`` (regions), ``entered_per_image``,
        ``entered_share`` (of the proposals, 0 to 1), ``exit_rate`` (share of the entered regions
        that exited there, before the cascade was complete), ``left`` (the same by reason) and
        ``mean_score`` (mean largest foreground probability of the regions that left, by reason).
        ``stages_per_region`` is the mean number of stages computed for a proposal.
        ``overrun_share`` of the batches took longer than their time budget, by ``overrun_ms`` at
        most. With FLOPs, ``head_gflops_per_image`` is the work of the box heads,
        ``full_head_gflops_per_image`` that of all proposals at all stages, and
        ``head_flops_share`` their ratio.
        """
        gates = {"proposals": (self._proposed, self._before)} | {
            f"stage{index}": gate
            for index, gate in enumerate(zip(self._entered, self._left, strict=True))
        }
        return {
            "exits": {
                "images": self._num_images,
                "stages_per_region": _share(sum(self._entered), self._proposed),
                "overrun_share": _share(self._num_overruns, self._num_batches),
                "overrun_ms": self._longest_overrun,
                **self._head_work(),
                **{name: self._gate(entered, left) for name, (entered, left) in gates.items()},
            }
        }

    def _gate(self, entered: int, left: _Left) -> dict[str, Any]:
        return {
            "entered": entered,
            "entered_per_image": _share(entered, self._num_images),
            "entered_share": _share(entered, self._proposed),
            "exit_rate": _share(left.early(), entered),
            "left": {
                reason: _share(left.counts[reason], entered) for reason in _in_order(left.counts)
            },
            "mean_score": {
                reason: float(left.scores[reason] / left.counts[reason])
                for reason in _in_order(left.counts)
                if reason in left.scores
            },
        }

    def _head_work(self) -> dict[str, float]:
        if self._flops is None or not self._entered:
            return {}
        stages, scores = self._flops.stages, self._flops.scores
        done = _dot(self._entered, stages) + _dot(
            (sum(left.counts[reason] for reason in _REPORTED) for left in self._left), scores
        )
        full = self._proposed * (sum(stages) + scores[-1])
        return {
            "head_gflops_per_image": _share(done / _GIGA, self._num_images),
            "full_head_gflops_per_image": _share(full / _GIGA, self._num_images),
            "head_flops_share": _share(done, full),
        }

    def _add(self, state: Mapping[str, Any]) -> None:
        if not self._num_images:
            self._entered = [0] * len(state["entered"])
            self._left = [_Left() for _ in state["entered"]]
        self._num_images += state["images"]
        self._num_batches += state["batches"]
        self._proposed += state["proposed"]
        self._before.add(state["left_before"], {})
        self._entered = [a + b for a, b in zip(self._entered, state["entered"], strict=True)]
        for total, counts, scores in zip(self._left, state["left"], state["scores"], strict=True):
            total.add(counts, scores)
        self._num_overruns += state["overruns"]
        self._longest_overrun = max(self._longest_overrun, state["longest_overrun"])


def _state_of(images: int, stats: CascadeStats) -> dict[str, Any]:
    return {
        "images": images,
        "batches": 1,
        "proposed": stats.proposed,
        "left_before": stats.left_before,
        "entered": stats.entered,
        "left": stats.left,
        # Not recorded without exits.
        "scores": stats.confidence or [{} for _ in stats.entered],
        "overruns": int(stats.overrun_ms > 0),
        "longest_overrun": stats.overrun_ms,
    }


def _in_order(counts: Mapping[str, int]) -> list[str]:
    """The reasons of exits, known ones first."""
    names = (*EXIT_REASONS, *sorted(counts.keys() - set(EXIT_REASONS)))
    return [name for name in names if counts.get(name)]


def _dot(counts: Iterable[int], weights: Iterable[float]) -> float:
    return sum(count * weight for count, weight in zip(counts, weights, strict=True))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0

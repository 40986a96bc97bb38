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
class _Sums:
    """Sums over batches, see ``CascadeStats``.

    The scores are exact: the same for any number of processes and any order of images.
    """

    images: int = 0
    batches: int = 0
    proposed: int = 0
    entered: list[int] = field(default_factory=list)
    left_before: Counter[str] = field(default_factory=Counter)
    left: list[Counter[str]] = field(default_factory=list)
    scores: list[dict[str, Fraction]] = field(default_factory=list)
    overruns: int = 0
    longest_overrun: float = 0.0
    detected: int = 0
    masks: int = 0
    tiles: int = 0
    tiles_open: int = 0
    tiles_computed: int = 0

    def add(self, other: _Sums) -> None:
        if not self.images:
            stages = len(other.entered)
            self.entered = [0] * stages
            self.left = [Counter() for _ in range(stages)]
            self.scores = [{} for _ in range(stages)]
        self.images += other.images
        self.batches += other.batches
        self.proposed += other.proposed
        self.entered = [a + b for a, b in zip(self.entered, other.entered, strict=True)]
        self.left_before.update(other.left_before)
        for counts, more in zip(self.left, other.left, strict=True):
            counts.update(more)
        for sums, added in zip(self.scores, other.scores, strict=True):
            for reason, score in added.items():
                sums[reason] = sums.get(reason, Fraction(0)) + score
        self.overruns += other.overruns
        self.longest_overrun = max(self.longest_overrun, other.longest_overrun)
        self.detected += other.detected
        self.masks += other.masks
        self.tiles += other.tiles
        self.tiles_open += other.tiles_open
        self.tiles_computed += other.tiles_computed


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
        self._sums = _Sums()

    def process(self, batch: Sequence[Sample], output: DetectorOutput) -> None:
        """Add the counts of one batch.

        Raises:
            ValueError: the number of stages differs from that of the batches before.
        """
        self._sums.add(_sums_of(len(batch), output.stats))

    def state(self) -> _Sums:
        """Counts and sums."""
        return self._sums

    def merge(self, states: Sequence[_Sums]) -> None:
        """Continue from the states of all processes.

        Raises:
            ValueError: the number of stages differs between two that saw images.
        """
        self.reset()
        for state in states:
            if state.images:
                self._sums.add(state)

    def evaluate(self) -> dict[str, Any]:
        """``{"exits": {"images": n, "stages_per_region": m, "proposals": {...}, "stage0": ...}}``.

        ``proposals`` and each stage have ``entered`` (regions), ``entered_per_image``,
        ``entered_share`` (of the proposals, 0 to 1), ``exit_rate`` (share of the entered regions
        that exited there, before the cascade was complete), ``left`` (the same by reason) and
        ``mean_score`` (mean largest foreground probability of the regions that left, by reason).
        ``stages_per_region`` is the mean number of stages computed for a proposal.
        ``overrun_share`` of the batches took longer than their time budget, by ``overrun_ms`` at
        most. With a tile gate, ``tiles`` has the tiles of the finest map ``per_image``, and the
        shares of them that were open for the RPN and that were computed, ``open_share`` and
        ``computed_share``. For a cascade with masks, ``masks`` has the ``detections_per_image``,
        the ``masks_per_image`` made of them and their ``share``. With FLOPs,
        ``head_gflops_per_image`` is the work of the box heads, ``full_head_gflops_per_image`` that
        of all proposals at all stages, and ``head_flops_share`` their ratio.
        """
        sums = self._sums
        metrics = {
            "images": sums.images,
            "stages_per_region": _share(sum(sums.entered), sums.proposed),
            "overrun_share": _share(sums.overruns, sums.batches),
            "overrun_ms": sums.longest_overrun,
            **self._head_work(),
            **self._mask_work(),
            **self._tiles(),
            "proposals": self._gate(sums.proposed, sums.left_before, {}),
        }
        for index, gate in enumerate(zip(sums.entered, sums.left, sums.scores, strict=True)):
            metrics[f"stage{index}"] = self._gate(*gate)
        return {"exits": metrics}

    def _gate(
        self, entered: int, left: Counter[str], scores: Mapping[str, Fraction]
    ) -> dict[str, Any]:
        reasons = _in_order(left)
        return {
            "entered": entered,
            "entered_per_image": _share(entered, self._sums.images),
            "entered_share": _share(entered, self._sums.proposed),
            "exit_rate": _share(left.total() - left["completed"], entered),
            "left": {reason: _share(left[reason], entered) for reason in reasons},
            "mean_score": {
                reason: float(scores[reason] / left[reason])
                for reason in reasons
                if reason in scores
            },
        }

    def _head_work(self) -> dict[str, float]:
        if self._flops is None or not self._sums.entered:
            return {}
        sums, stages, scores = self._sums, self._flops.stages, self._flops.scores
        reported = [sum(left[reason] for reason in _REPORTED) for left in sums.left]
        done = _dot(sums.entered, stages) + _dot(reported, scores)
        full = sums.proposed * (sum(stages) + scores[-1])
        return {
            "head_gflops_per_image": _share(done / _GIGA, sums.images),
            "full_head_gflops_per_image": _share(full / _GIGA, sums.images),
            "head_flops_share": _share(done, full),
        }

    def _mask_work(self) -> dict[str, Any]:
        sums = self._sums
        if not sums.detected:
            return {}
        return {
            "masks": {
                "detections_per_image": _share(sums.detected, sums.images),
                "masks_per_image": _share(sums.masks, sums.images),
                "share": _share(sums.masks, sums.detected),
            }
        }

    def _tiles(self) -> dict[str, Any]:
        sums = self._sums
        if not sums.tiles:
            return {}
        return {
            "tiles": {
                "per_image": _share(sums.tiles, sums.images),
                "open_share": _share(sums.tiles_open, sums.tiles),
                "computed_share": _share(sums.tiles_computed, sums.tiles),
            }
        }


def _sums_of(images: int, stats: CascadeStats) -> _Sums:
    # Without exits, no scores are recorded.
    confidence = stats.confidence or [{} for _ in stats.entered]
    return _Sums(
        images=images,
        batches=1,
        proposed=stats.proposed,
        entered=stats.entered,
        left_before=Counter(stats.left_before),
        left=[Counter(left) for left in stats.left],
        scores=[{reason: Fraction(x) for reason, x in sums.items()} for sums in confidence],
        overruns=int(stats.overrun_ms > 0),
        longest_overrun=stats.overrun_ms,
        detected=stats.detected,
        masks=stats.masks,
        tiles=stats.tiles,
        tiles_open=stats.tiles_open,
        tiles_computed=stats.tiles_computed,
    )


def _in_order(counts: Mapping[str, int]) -> list[str]:
    """The reasons of exits, known ones first."""
    names = (*EXIT_REASONS, *sorted(counts.keys() - set(EXIT_REASONS)))
    return [name for name in names if counts.get(name)]


def _dot(counts: Iterable[int], weights: Iterable[float]) -> float:
    return sum(count * weight for count, weight in zip(counts, weights, strict=True))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0

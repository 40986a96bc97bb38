"""How many regions each stage computes, and why they leave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cascade_det.core.structures import EXIT_REASONS, DetectorOutput
from cascade_det.evaluation.evaluator import Evaluator, Sample


class ExitEvaluator(Evaluator):
    """Adds up the statistics of a cascade over a data set."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything that was processed."""
        self._num_images = 0
        self._entered: list[int] = []
        self._left: list[Counter[str]] = []

    def process(self, batch: Sequence[Sample], output: DetectorOutput) -> None:
        """Add the counts of one batch.

        Raises:
            ValueError: the number of stages differs from that of the batches before.
        """
        self._add(len(batch), output.stats.entered, output.stats.left)

    def state(self) -> dict[str, Any]:
        """``images``, and per stage the regions that ``entered`` and that ``left`` by reason."""
        left = [dict(counts) for counts in self._left]
        return {"images": self._num_images, "entered": self._entered, "left": left}

    def merge(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the states of all processes.

        Raises:
            ValueError: the number of stages differs between two that saw images.
        """
        self.reset()
        for state in states:
            if state["images"]:
                self._add(state["images"], state["entered"], state["left"])

    def evaluate(self) -> dict[str, Any]:
        """``{"exits": {"images": n, "stages_per_region": m, "stage0": {...}, ...}}``.

        Each stage has ``entered`` (regions), ``entered_per_image``, ``entered_share`` (of the
        regions that entered the cascade, 0 to 1), ``exit_rate`` (share of the entered that
        left before the cascade was complete) and ``left`` (share of the entered by reason).
        ``stages_per_region`` is the mean number of stages computed for a region.
        """
        first = self._entered[0] if self._entered else 0
        figures: dict[str, Any] = {
            "images": self._num_images,
            "stages_per_region": _share(sum(self._entered), first),
        }
        for index, (entered, left) in enumerate(zip(self._entered, self._left, strict=True)):
            early = left.total() - left["completed"]
            figures[f"stage{index}"] = {
                "entered": entered,
                "entered_per_image": _share(entered, self._num_images),
                "entered_share": _share(entered, first),
                "exit_rate": _share(early, entered),
                "left": {
                    reason: _share(left[reason], entered)
                    for reason in (*EXIT_REASONS, *sorted(left.keys() - set(EXIT_REASONS)))
                    if left[reason]
                },
            }
        return {"exits": figures}

    def _add(self, images: int, entered: Sequence[int], left: Sequence[Mapping[str, int]]) -> None:
        if not self._num_images:
            self._entered = [0] * len(entered)
            self._left = [Counter() for _ in left]
        self._num_images += images
        self._entered = [a + b for a, b in zip(self._entered, entered, strict=True)]
        for total, counts in zip(self._left, left, strict=True):
            total.update(counts)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0

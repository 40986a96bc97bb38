"""Metrics of a segmenter after each level of its decoder, and what left after each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from cascade_det.data.samples import Sample
from cascade_det.evaluation.evaluator import Evaluator
from cascade_det.evaluation.semantic import (
    IGNORE_LABEL,
    ConfusionMatrix,
    Counts,
    Labels,
    semantic_metrics,
)
from cascade_det.segmentation.output import SegmenterOutput

_METRICS = ("mIoU", "fwIoU", "mACC", "pACC")


class LevelEvaluator(Evaluator):
    """What the whole decoder predicts after each level, and how much left after it.

    Args:
        class_names: of the classes ``0..K-1``.
        truth_of: labels of the image of a sample, integers ``[height, width]``.
        ignore_label: truth of the pixels that do not count.
    """

    def __init__(
        self,
        *,
        class_names: Sequence[str],
        truth_of: Callable[[Sample], Labels],
        ignore_label: int = IGNORE_LABEL,
    ) -> None:
        self._class_names = tuple(class_names)
        self._truth_of = truth_of
        self._ignore_label = ignore_label
        self.reset()

    def reset(self) -> None:
        """Discard everything that was processed."""
        self._confusions: list[ConfusionMatrix] = []
        self._left: list[Counter[str]] = []

    def process(self, batch: Sequence[Sample], output: SegmenterOutput) -> None:
        """Add a batch.

        Raises:
            ValueError: the output has no levels, or the truth of an image another size.
        """
        if output.levels is None:
            raise ValueError("no output per level: run the segmenter with levels=True")
        self._resize(len(output.levels))
        truths = [self._truth_of(sample) for sample in batch]
        for confusion, labels in zip(self._confusions, output.levels, strict=True):
            for predicted, truth in zip(labels, truths, strict=True):
                confusion.update(predicted.cpu().numpy(), truth)
        for counts, left in zip(self._left, output.stats.left, strict=True):
            counts.update(left)

    def state(self) -> tuple[list[Counts], list[Counter[str]]]:
        """Per level the confusion matrix and what left; empty if nothing was processed."""
        return [confusion.counts for confusion in self._confusions], self._left

    def merge(self, states: Sequence[tuple[list[Counts], list[Counter[str]]]]) -> None:
        """Continue from the sums over all processes."""
        self.reset()
        for counts, left in states:
            if counts:
                self._resize(len(counts))
                for level, confusion in enumerate(self._confusions):
                    confusion.counts = confusion.counts + counts[level]
                    self._left[level].update(left[level])

    def evaluate(self) -> dict[str, Any]:
        """``{"levels": {"level0": {...}, ...}}``, coarsest first.

        Each has ``mIoU``, ``fwIoU``, ``mACC`` and ``pACC`` of the whole decoder stopped after it,
        in percent; ``entered``, the share of the images or patches that it was computed for, and
        ``left``, the share that left after it, both 0 to 1.
        """
        staying = total = sum(sum(left.values()) for left in self._left)
        levels: dict[str, Any] = {}
        for level, (confusion, left) in enumerate(zip(self._confusions, self._left, strict=True)):
            metrics = semantic_metrics(confusion.counts, self._class_names)
            gone = sum(left.values())
            levels[f"level{level}"] = {
                **{name: metrics[name] for name in _METRICS},
                "entered": staying / total,
                "left": gone / total,
            }
            staying -= gone
        return {"levels": levels}

    def _resize(self, levels: int) -> None:
        while len(self._confusions) < levels:
            classes = len(self._class_names)
            self._confusions.append(ConfusionMatrix(classes, ignore_label=self._ignore_label))
            self._left.append(Counter())

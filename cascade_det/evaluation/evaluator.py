"""What every evaluator can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from cascade_det.core.structures import DetectorOutput

Sample = Mapping[str, Any]


class Evaluator(ABC):
    """Collects the outputs of a detector over a data set and turns them into figures.

    Several processes that each see a share of the images exchange their ``state()``; one that
    merges the states of all of them has the figures of a single process that saw all images.
    """

    @abstractmethod
    def reset(self) -> None:
        """Forget everything that was processed."""

    @abstractmethod
    def process(self, batch: Sequence[Sample], output: DetectorOutput) -> None:
        """Take in one batch and what the detector returned for it."""

    @abstractmethod
    def state(self) -> Any:
        """All that was processed, as plain types and arrays that can be pickled."""

    @abstractmethod
    def merge(self, states: Sequence[Any]) -> None:
        """Go on from the states of all processes, in rank order, in place of the own one."""

    @abstractmethod
    def evaluate(self) -> dict[str, Any]:
        """The figures, under top-level keys that no other evaluator uses."""

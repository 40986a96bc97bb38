"""The interface of evaluators."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from cascade_det.core.structures import DetectorOutput
from cascade_det.data.samples import Sample


class Evaluator(Protocol):
    """Collects a detector's outputs over a data set and computes metrics from them.

    Several processes that each see a share of the images exchange their ``state()``; after
    merging all states, one of them has the metrics of a single process that saw all images.
    """

    @abstractmethod
    def process(self, batch: Sequence[Sample], output: DetectorOutput) -> None:
        """Add one batch and the detector's output for it."""

    @abstractmethod
    def state(self) -> Any:
        """Everything collected, picklable."""

    @abstractmethod
    def merge(self, states: Sequence[Any]) -> None:
        """Replace this state by the states of all processes, in rank order."""

    @abstractmethod
    def evaluate(self) -> Mapping[str, Any]:
        """The metrics, under top-level keys that no other evaluator uses."""

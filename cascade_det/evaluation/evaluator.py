"""The interface of evaluators."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from cascade_det.data.samples import Sample


class Evaluator(Protocol):
    """Collects outputs of a model over a data set and computes metrics from them.

    Several processes that each see a share of the images exchange their ``state()``; after
    merging all states, one of them has the metrics of a single process that saw all images.
    """

    @abstractmethod
    def process(self, batch: Sequence[Sample], output: Any) -> None:
        """Add one batch and the output of the detector or segmenter for it."""

    @abstractmethod
    def state(self) -> Any:
        """Everything collected, picklable."""

    @abstractmethod
    def merge(self, states: Sequence[Any]) -> None:
        """Replace this state by the states of all processes, in rank order."""

    @abstractmethod
    def evaluate(self) -> Mapping[str, Any]:
        """The metrics, under top-level keys that no other evaluator uses."""

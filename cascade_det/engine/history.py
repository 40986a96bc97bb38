"""Metrics of a training by iteration, smoothed for reading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fvcore.common.history_buffer import HistoryBuffer

# Losses jump from batch to batch; readers get the median of this many.
WINDOW = 20
# Values kept per scalar: enough for a robust estimate of the seconds per iteration.
_KEPT = 1000


class History:
    """Scalars by name, each with the iterations that it was measured at.

    Attributes:
        iteration: the iteration under which :meth:`put` stores values.
    """

    def __init__(self) -> None:
        self.iteration = 0
        # The values of each scalar, and whether readers get a median.
        self._series: dict[str, tuple[HistoryBuffer, bool]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._series

    def __iter__(self) -> Iterator[str]:
        return iter(self._series)

    def put(self, name: str, value: float, *, smooth: bool = True) -> None:
        """Add a value; ``smooth``: readers get a median."""
        if name not in self._series:
            self._series[name] = HistoryBuffer(_KEPT), smooth
        self._series[name][0].update(float(value), self.iteration)

    def put_all(self, values: Mapping[str, float], *, smooth: bool = True) -> None:
        """Add values by name."""
        for name, value in values.items():
            self.put(name, value, smooth=smooth)

    def latest(self, name: str) -> tuple[float, int]:
        """The last value, unsmoothed, and its iteration."""
        value, iteration = self._series[name][0].values()[-1]
        return value, int(iteration)

    def smoothed(self, name: str) -> float:
        """The median of the last ``WINDOW`` values of a noisy scalar, else the last value."""
        return self.median(name) if self._series[name][1] else self.latest(name)[0]

    def median(self, name: str, window: int = WINDOW) -> float:
        """The median of the last ``window`` values."""
        return float(self._series[name][0].median(window))

    def mean(self, name: str) -> float:
        """The mean of the last ``WINDOW`` values."""
        return float(self._series[name][0].avg(WINDOW))

    def state_dict(self) -> dict[str, Any]:
        """What smoothing needs to continue, as plain types."""
        return {
            name: {
                "smooth": smooth,
                "values": [[float(v), int(i)] for v, i in buffer.values()[-WINDOW:]],
            }
            for name, (buffer, smooth) in self._series.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; other values are dropped."""
        self._series.clear()
        now = self.iteration
        for name, entry in state.items():
            for value, self.iteration in entry["values"]:
                self.put(name, value, smooth=entry["smooth"])
        self.iteration = now

"""The figures of a run: what was measured, at which iteration, smoothed for reading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from fvcore.common.history_buffer import HistoryBuffer
from torch import Tensor

from cascade_det.parallel import distributed

# Losses jump from batch to batch; readers get the median of this many.
WINDOW = 20
# Values that each scalar keeps: enough for a robust estimate of the seconds per iteration.
_KEPT = 1000


class History:
    """Scalars by name, each with the iterations that it was measured at.

    Attributes:
        iteration: the iteration that :meth:`put` files values under.
    """

    def __init__(self) -> None:
        self.iteration = 0
        self._buffers: dict[str, HistoryBuffer] = {}
        self._smoothed: dict[str, bool] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._buffers

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def put(self, name: str, value: float, *, smooth: bool = True) -> None:
        """File ``value``; ``smooth`` says whether readers should see a median."""
        if name not in self._buffers:
            self._buffers[name] = HistoryBuffer(_KEPT)
            self._smoothed[name] = smooth
        self._buffers[name].update(float(value), self.iteration)

    def put_all(self, values: Mapping[str, float], *, smooth: bool = True) -> None:
        """:meth:`put` for each of ``values``."""
        for name, value in values.items():
            self.put(name, value, smooth=smooth)

    def latest(self, name: str) -> tuple[float, int]:
        """The last value of ``name`` as it was put, and its iteration."""
        value, iteration = self._buffers[name].values()[-1]
        return value, int(iteration)

    def smoothed(self, name: str) -> float:
        """The median of the last ``WINDOW`` values where the scalar is noisy, else the last."""
        return self.median(name) if self._smoothed[name] else self.latest(name)[0]

    def median(self, name: str, window: int = WINDOW) -> float:
        """The median of the last ``window`` values."""
        return float(self._buffers[name].median(window))

    def mean(self, name: str) -> float:
        """The mean of the last ``WINDOW`` values."""
        return float(self._buffers[name].avg(WINDOW))

    def state_dict(self) -> dict[str, Any]:
        """What smoothing needs to go on where it was, as plain types."""
        return {
            name: {
                "smooth": self._smoothed[name],
                "values": [[float(v), int(i)] for v, i in buffer.values()[-WINDOW:]],
            }
            for name, buffer in self._buffers.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; what was filed before is forgotten."""
        self._buffers.clear()
        self._smoothed.clear()
        now = self.iteration
        for name, entry in state.items():
            for value, self.iteration in entry["values"]:
                self.put(name, value, smooth=entry["smooth"])
        self.iteration = now


def mean_metrics(
    parts: Sequence[Mapping[str, Tensor | float]],
    overall: Mapping[str, Tensor | float],
    device: torch.device,
) -> dict[str, float]:
    """Means over the parts of a batch and over the processes, with one transfer from the device.

    A metric is averaged over those that have it: NaN means no value. A loss that is NaN anywhere
    is NaN, and so is what is overall.

    Args:
        parts: losses and metrics of each part, scalars, all of the same names.
        overall: scalars of all parts of this process together.
        device: where the scalars are.
    """
    names = [*parts[0], *overall]
    merged = [{**part, **overall} for part in parts]
    rows = [torch.stack([_scalar(row[name], device) for name in names]) for row in merged]
    table = torch.stack(rows)
    strict = torch.tensor(["loss" in name or name in overall for name in names], device=device)
    known = ~table.isnan() | strict
    sums, counts = torch.where(known, table, 0.0).sum(dim=0), known.sum(dim=0)
    totals = distributed.mean_over_processes(torch.cat([sums, counts.float()]))
    values = (totals[: len(names)] / totals[len(names) :]).tolist()
    return dict(zip(names, values, strict=True))


def _scalar(value: Tensor | float, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float32)
    # Unlike a copy from the host, that waits for nothing.
    return torch.full((), value, dtype=torch.float32, device=device)

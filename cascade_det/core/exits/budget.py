"""Rules that end the work on regions when a budget is used up (anytime inference)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from cascade_det.core.exits.view import RegionView


class RegionBudget:
    """Lets only the best-scored regions of every image enter a stage.

    Args:
        most: regions of an image that may enter stage 0, 1, ...; 0 for any number.
    """

    reason = "budget"

    def __init__(self, most: Sequence[int]) -> None:
        self.most = tuple(most)

    def is_active(self, stage: int) -> bool:
        """Whether anything may leave after ``stage`` (-1: before the first)."""
        return self.most[stage + 1] > 0

    def leaves(self, view: RegionView) -> Tensor:
        """Bool ``[R]``."""
        return view.ranks >= self.most[view.stage + 1]


class TimeBudget:
    """Ends the cascade where the next stage, as it looks, would end after the time is over.

    How long the next stage takes is told from the last one, region by region; how long it takes
    to report what was found, from the call before. Stage 0 always runs, so that there is
    something to report. The budget is kept as far as these foresee: by how much a call went over
    it is measured. Outside of a call, as in a replay, nobody leaves.

    Args:
        milliseconds: of a call, from its start to its end.
        per_image: whether they are for each image of a batch rather than for all of it.
        clock: gives seconds.

    Attributes:
        overrun_ms: by how much the last call took longer than its budget.
    """

    reason = "budget"

    def __init__(
        self,
        milliseconds: float,
        *,
        per_image: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.milliseconds = milliseconds
        self.per_image = per_image
        self.clock = clock
        self.overrun_ms = 0.0
        self._end: float | None = None
        self._last_gate = 0.0
        self._entered = 0
        self._report_seconds = 0.0

    def start(self, num_images: int, started: float | None) -> None:
        """Begin a call.

        Args:
            num_images: of its batch.
            started: reading of ``clock`` when work on the images began; ``None`` for now.
        """
        seconds = self.milliseconds / 1000 * (num_images if self.per_image else 1)
        self._end = (self.clock() if started is None else started) + seconds

    @contextmanager
    def call(self, num_images: int, started: float | None) -> Iterator[None]:
        """Within the block a call runs; arguments as in ``start``. An error ends it as well."""
        self.start(num_images, started)
        try:
            yield
        finally:
            self._end = None

    def is_active(self, stage: int) -> bool:
        """At every gate of a call, if only to read the clock."""
        return self._end is not None

    def leaves(self, view: RegionView) -> Tensor:
        """Bool ``[R]``: all or none."""
        assert self._end is not None
        now = self._now(view.boxes.device)
        over = False
        if view.stage >= 0:
            next_stage = (now - self._last_gate) / max(self._entered, 1) * len(view)
            over = now + next_stage + self._report_seconds > self._end
        self._last_gate, self._entered = now, len(view)
        return torch.full((len(view),), over, dtype=torch.bool, device=view.boxes.device)

    def stages_are_done(self, device: torch.device) -> None:
        """From here on a call reports what it found."""
        self._last_gate = self._now(device)

    def finish(self, device: torch.device) -> None:
        """End a call."""
        assert self._end is not None
        now = self._now(device)
        self._report_seconds = now - self._last_gate
        self.overrun_ms = max(0.0, (now - self._end) * 1000)
        self._end = None

    def _now(self, device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return self.clock()

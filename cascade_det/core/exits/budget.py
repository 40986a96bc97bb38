"""Rules that end the work on regions when a budget is used up (anytime inference)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

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
    """How long a call of a cascade may take.

    What is known of a call in progress is in its :class:`Deadline`, so that threads may share a
    budget. Common to all calls is one number alone: how long the call that ended last took to
    report what it had found.

    Args:
        milliseconds: of a call, from its start to its end.
        per_image: whether they are for each image of a batch rather than for all of it.
        clock: gives seconds.

    Attributes:
        report_seconds: from the end of the stages to the end of the call, in the call that ended
            last; 0 before the first one has.
    """

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
        self.report_seconds = 0.0

    def start(self, num_images: int, started: float | None) -> Deadline:
        """The deadline of a call that begins.

        Args:
            num_images: of its batch.
            started: reading of ``clock`` when work on the images began; ``None`` for now.
        """
        seconds = self.milliseconds / 1000 * (num_images if self.per_image else 1)
        return Deadline(self, (self.clock() if started is None else started) + seconds)


class Deadline:
    """Ends the cascade where the next stage, as it looks, would end after the time is over.

    How long the next stage takes is told from the last one, region by region; how long it takes
    to report what was found, from an earlier call. Stage 0 always runs, so that there is
    something to report. The budget is kept as far as these foresee: by how much a call went over
    it is measured.

    Args:
        budget: of the call.
        end: reading of its clock when the time is over.
    """

    reason = "budget"

    def __init__(self, budget: TimeBudget, end: float) -> None:
        self._budget = budget
        self._end = end
        self._last_gate = 0.0
        self._entered = 0

    def is_active(self, stage: int) -> bool:
        """At every gate, if only to read the clock."""
        return True

    def leaves(self, view: RegionView) -> Tensor:
        """Bool ``[R]``: all or none."""
        now = self._now(view.boxes.device)
        over = False
        if view.stage >= 0:
            next_stage = (now - self._last_gate) / max(self._entered, 1) * len(view)
            over = now + next_stage + self._budget.report_seconds > self._end
        self._last_gate, self._entered = now, len(view)
        return torch.full((len(view),), over, dtype=torch.bool, device=view.boxes.device)

    def stages_are_done(self, device: torch.device) -> None:
        """From here on the call reports what it found."""
        self._last_gate = self._now(device)

    def finish(self, device: torch.device) -> float:
        """End the call; by how many milliseconds it took longer than its budget."""
        now = self._now(device)
        self._budget.report_seconds = now - self._last_gate
        return max(0.0, (now - self._end) * 1000)

    def _now(self, device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return self._budget.clock()

"""Budgets of regions and of time (anytime inference)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cascade_det.core.exits.view import RegionView


class RegionBudget:
    """Keeps only the best-scored regions of every image.

    Args:
        most: S limits of the regions per image that enter stage 0, 1, ...; 0 is no limit.
    """

    reason = "budget"

    def __init__(self, most: Sequence[int]) -> None:
        self.most = tuple(most)

    def is_active(self, stage: int) -> bool:
        """Whether regions can exit after ``stage`` (-1: before stage 0)."""
        return self.most[stage + 1] > 0

    def exit_mask(self, view: RegionView) -> Tensor:
        """Bool ``[R]``."""
        return view.ranks >= self.most[view.stage + 1]

    def sizes_after(self, view: RegionView) -> tuple[int, ...] | None:
        """How many regions of each image stay, ``None`` if the CPU does not know."""
        if view.sizes is None or view.gone is not None:
            return None
        return tuple(min(size, self.most[view.stage + 1]) for size in view.sizes)


@dataclass
class TimeBudget:
    """Time limit of a call of the cascade.

    The state of a call is in its :class:`Deadline`, so threads may share a budget. All calls share
    ``report_seconds`` alone.

    Args:
        milliseconds: limit of a call, from its start to its end.
        per_image: multiply the limit by the number of images of a batch.
        clock: returns seconds.

    Attributes:
        report_seconds: time from the end of the stages to the end of the call, in the last call
            that ended; initially 0.
    """

    milliseconds: float
    per_image: bool = True
    clock: Callable[[], float] = time.perf_counter
    report_seconds: float = field(default=0.0, init=False)

    def start(self, num_images: int, started: float | None) -> Deadline:
        """Start a call.

        Args:
            num_images: N of the batch.
            started: ``clock()`` when work on the images began; ``None`` for now.
        """
        seconds = self.milliseconds / 1000 * (num_images if self.per_image else 1)
        return Deadline(self, (self.clock() if started is None else started) + seconds)


class Deadline:
    """Ends the cascade before a stage that is expected to exceed the time budget.

    The next stage is estimated by the time per region of the last one, and post-processing by an
    earlier call. Stage 0 always runs, so there is always a result. A call can exceed its budget
    where the estimates are too low; ``finish`` measures by how much.

    Args:
        budget: of the call.
        end: reading of its clock at which the time is over.
    """

    reason = "budget"

    def __init__(self, budget: TimeBudget, end: float) -> None:
        self._budget = budget
        self._end = end
        self._last_gate = 0.0
        self._entered = 0

    def is_active(self, stage: int) -> bool:
        """Always true: the clock is read at every gate."""
        return True

    def exit_mask(self, view: RegionView) -> Tensor:
        """Bool ``[R]``: all regions or none."""
        now = self._now(view.boxes.device)
        live = len(view) if view.gone is None else len(view) - int(view.gone.sum())
        over = False
        if view.stage >= 0:
            next_stage = (now - self._last_gate) / max(self._entered, 1) * live
            over = now + next_stage + self._budget.report_seconds > self._end
        self._last_gate, self._entered = now, live
        return torch.full((len(view),), over, dtype=torch.bool, device=view.boxes.device)

    def mark_stages_done(self, device: torch.device) -> None:
        """Post-processing begins."""
        self._last_gate = self._now(device)

    def finish(self, device: torch.device) -> float:
        """End the call; returns the milliseconds by which it exceeded its budget, or 0."""
        now = self._now(device)
        self._budget.report_seconds = now - self._last_gate
        return max(0.0, (now - self._end) * 1000)

    def _now(self, device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return self._budget.clock()

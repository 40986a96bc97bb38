"""What both training loops share, and what hooks use of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from cascade_det.engine.step import TrainingStep
from cascade_det.parallel.interrupts import Interrupted, InterruptRequest, ending_at_once

logger = logging.getLogger(__name__)


class Metrics(Protocol):
    """The part of a history that hooks use in both hosts."""

    def __contains__(self, name: str, /) -> bool:
        """Whether the metric has been measured."""

    def __iter__(self) -> Iterator[str]:
        """The names of the metrics."""

    def latest(self, name: str) -> tuple[float, int]:
        """Its last value and the iteration of that."""

    def smoothed(self, name: str) -> float:
        """The median of its last values if it is noisy, else the last one."""

    def put_all(self, values: Mapping[str, float], *, smooth: bool = True) -> None:
        """Add values by name; ``smooth``: readers get a median."""


class TrainingLoop:
    """A training in either host, which a hook or a signal can end early.

    Attributes:
        step: trains on one batch.
        iteration: the current iteration, or the last completed one; from 0.
        start_iter: the first iteration of this run.
        max_iter: one more than the last iteration.
        device: of the detector.
        results: of the last evaluation; empty before it.
        finished: whether training reached its end, by ``max_iter`` or by :meth:`stop`.
        resumable: whether a checkpoint written now, after an error or a signal, would continue with
            the next iteration as if never stopped. The checkpoint hook sets it after each step in a
            single process; several processes are resumable only if they are interrupted together.
        last_checkpoint: the newest file that was saved or resumed, for messages.
    """

    step: TrainingStep
    iteration: int
    start_iter: int
    max_iter: int
    device: torch.device
    results: dict[str, Any]
    finished = False
    resumable = False
    last_checkpoint: str | None = None
    _stopping = False
    _interrupt: InterruptRequest

    @property
    def history(self) -> Metrics:
        """What was measured."""
        raise NotImplementedError

    def stop(self) -> None:
        """End training as finished, after the hooks of this iteration."""
        self._stopping = True

    def interruptible(self) -> AbstractContextManager[None]:
        """For long work in a hook: within the block a signal ends the training at once."""
        where = f"Interrupted in the hooks after iteration {self.iteration}"
        return ending_at_once(self._interrupt, where)

    def _train_on(self, batch: list[Any], iteration: int) -> tuple[dict[str, float], bool]:
        """Run the step of an iteration, see :meth:`TrainingStep.run`."""
        # In this order: a signal may raise between the two.
        self.resumable = False
        self.iteration = iteration
        return self.step.run(
            batch,
            iteration,
            interrupted=bool(self._interrupt),
            last_checkpoint=self.last_checkpoint,
        )

    def _is_complete(self) -> bool:
        """Whether nothing is left to train; logs which iterations are."""
        if self.start_iter >= self.max_iter:
            logger.info(
                "This training is complete: all %d iterations of SOLVER.MAX_ITER are done. Raise "
                "SOLVER.MAX_ITER to train longer.",
                self.max_iter,
            )
            return True
        logger.info("Training from iteration %d to %d", self.start_iter, self.max_iter)
        return False

    def _is_stopped(self, interrupted: bool) -> bool:
        """Whether a hook has stopped the training in this iteration.

        Raises:
            Interrupted: a signal reached one of the processes, and iterations are left.
        """
        if not self._stopping and interrupted and self.iteration < self.max_iter - 1:
            self.resumable = True
            raise Interrupted(f"Interrupted after iteration {self.iteration} of {self.max_iter}")
        return self._stopping

"""How a training ends before its time: a hook or a signal asks for it, or nothing is left to do."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager

from cascade_det.parallel.interrupts import Interrupted, InterruptRequest, ending_at_once

logger = logging.getLogger(__name__)


class RunControl:
    """What the trainers of both hosts have in common beside the step.

    Attributes:
        iteration: the iteration that runs, or was completed last; from 0.
        start_iter: the first one of this run.
        max_iter: one more than the last one.
        resumable: whether a checkpoint now, after an end that was not good, would go on with the
            next iteration as if nothing had happened. The hook that saves checkpoints sets it
            after a step; of several processes, only those that are interrupted together are.
    """

    iteration: int
    start_iter: int
    max_iter: int
    resumable = False
    _stopping = False
    _interrupt: InterruptRequest

    def stop(self) -> None:
        """End training, as if done, after the hooks of this iteration."""
        self._stopping = True

    def interruptible(self) -> AbstractContextManager[None]:
        """For what a hook does for long: within the block a signal ends the training at once."""
        where = f"Interrupted in the hooks after iteration {self.iteration}"
        return ending_at_once(self._interrupt, where)

    def _is_complete(self) -> bool:
        """Whether nothing is left to train; the log says what is."""
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
        """Whether a hook asked for an end after this iteration.

        Raises:
            Interrupted: a signal did, of any process, and iterations are left.
        """
        if not self._stopping and interrupted and self.iteration < self.max_iter - 1:
            self.resumable = True
            raise Interrupted(f"Interrupted after iteration {self.iteration} of {self.max_iter}")
        return self._stopping

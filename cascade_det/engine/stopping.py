"""How a training ends early: a hook or a signal stops it, or nothing is left to train."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager

from cascade_det.parallel.interrupts import Interrupted, InterruptRequest, ending_at_once

logger = logging.getLogger(__name__)


class StoppableLoop:
    """The part of a training loop that both hosts share.

    Attributes:
        resumable: whether a checkpoint written now, after an error or a signal, would go on with
            the next iteration as if nothing had happened. The checkpoint hook sets it after each
            step in a single process; several processes are resumable only if they are interrupted
            together.
    """

    iteration: int
    start_iter: int
    max_iter: int
    resumable = False
    _stopping = False
    _interrupt: InterruptRequest

    def stop(self) -> None:
        """End training as finished, after the hooks of this iteration."""
        self._stopping = True

    def interruptible(self) -> AbstractContextManager[None]:
        """For long work in a hook: within the block a signal ends the training at once."""
        where = f"Interrupted in the hooks after iteration {self.iteration}"
        return ending_at_once(self._interrupt, where)

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

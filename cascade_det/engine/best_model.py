"""The best weights of a training, and an end when nothing better comes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade_det.engine.checkpoint import Checkpointer
from cascade_det.engine.hooks import Hook, scalars_of

if TYPE_CHECKING:
    from cascade_det.engine.trainer import Trainer

logger = logging.getLogger(__name__)

BEST = "model_best"


class BestModel(Hook):
    """Saves the best weights as ``model_best.pth``, and stops when nothing better comes.

    Put it after evaluation. The file has no state of training: it is to be used, not resumed, and
    ``last_checkpoint`` does not name it.

    Args:
        checkpointer: writes the file.
        metric: name in the history, such as ``bbox/AP``; more is better, but of losses, which are
            below ``validation/`` or end in ``loss``, less. NaN is never better.
        patience: evaluations in a row without improvement that end training; 0 for never.
    """

    def __init__(self, checkpointer: Checkpointer, metric: str, patience: int = 0) -> None:
        self._checkpointer = checkpointer
        self._metric = metric
        is_loss = metric.startswith("validation/") or metric.endswith("loss")
        self._sign = -1.0 if is_loss else 1.0
        self._patience = patience
        self._best: float | None = None
        self._best_iteration = self._seen = -1
        self._waited = 0
        self._warned = False

    def before_train(self, trainer: Trainer) -> None:
        """Look at an evaluation that a resumed run begins with; end one that ended before."""
        self.after_step(trainer)
        self._stop_without_hope(trainer)

    def after_step(self, trainer: Trainer) -> None:
        """Look at the figure, if this iteration has a new one."""
        if not trainer.results:
            return
        if self._metric not in trainer.history:
            self._warn_once(trainer)
            return
        value, iteration = trainer.history.latest(self._metric)
        if iteration != trainer.iteration or iteration == self._seen:
            return
        self._seen = iteration
        is_first = self._best is None and not math.isnan(value)
        if is_first or self._sign * value > self._sign * (self._best or 0.0):
            self._best, self._best_iteration, self._waited = value, iteration, 0
            self._checkpointer.save_weights(BEST, iteration=iteration, metric={self._metric: value})
            return
        self._waited += 1
        self._stop_without_hope(trainer)

    def after_train(self, trainer: Trainer) -> None:
        """Look at the last evaluation, and say which one was the best."""
        self.after_step(trainer)
        if trainer.finished and self._best is not None:
            logger.info(
                "Best %s: %.4g after iteration %d, in %s",
                *(self._metric, self._best, self._best_iteration),
                Path(self._checkpointer.save_dir, f"{BEST}.pth"),
            )

    def state_dict(self) -> dict[str, Any]:
        """The best so far, and how long ago it was."""
        return {
            "metric": self._metric,
            "best": self._best,
            "iteration": self._best_iteration,
            "seen": self._seen,
            "waited": self._waited,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on waiting where the last run stopped; begin anew with another metric."""
        if state["metric"] != self._metric:
            logger.info("CASCADE.BEST_METRIC was %s: the best is sought anew", state["metric"])
            return
        self._best, self._best_iteration = state["best"], state["iteration"]
        self._seen, self._waited = state["seen"], state["waited"]

    def _stop_without_hope(self, trainer: Trainer) -> None:
        if 0 < self._patience <= self._waited:
            logger.info(
                "Stopping after iteration %d: %s has not become better than %.4g (iteration %d) in "
                "%d evaluations. Raise CASCADE.PATIENCE, %d now, to train on.",
                *(trainer.iteration, self._metric),
                *(math.nan if self._best is None else self._best, self._best_iteration),
                *(self._waited, self._patience),
            )
            trainer.stop()

    def _warn_once(self, trainer: Trainer) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "CASCADE.BEST_METRIC %r is not among the results, so no best checkpoint is kept. "
                "There are: %s",
                self._metric,
                ", ".join(name for name, _ in scalars_of(trainer.results)),
            )

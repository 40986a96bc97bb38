"""Keeps the best weights of a training, and stops it when they no longer improve."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cascade_det.engine.checkpoint import Checkpointer
from cascade_det.engine.hooks import Hook, scalars_of
from cascade_det.engine.loop import TrainingLoop

logger = logging.getLogger(__name__)

BEST = "model_best"


class BestModel(Hook):
    """Saves the best weights as ``model_best.pth``; stops after ``patience`` worse evaluations.

    Put it after evaluation. The file holds no training state: it is for inference, not for
    resuming, and ``last_checkpoint`` does not name it.

    Args:
        checkpointer: writes the file.
        metric: name in the history, such as ``bbox/AP``. Higher is better, except for losses,
            whose names start with ``validation/`` or end in ``loss``. NaN is never better.
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

    def before_train(self, trainer: TrainingLoop) -> None:
        """Process an evaluation that a resumed run starts with; stop if patience has run out."""
        self.after_step(trainer)
        self._stop_if_out_of_patience(trainer)

    def after_step(self, trainer: TrainingLoop) -> None:
        """Compare the metric, if this iteration has measured it."""
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
        self._stop_if_out_of_patience(trainer)

    def after_train(self, trainer: TrainingLoop) -> None:
        """Process the last evaluation, and log which one was the best."""
        self.after_step(trainer)
        if trainer.finished and self._best is not None:
            logger.info(
                "Best %s: %.4g after iteration %d, in %s",
                self._metric,
                self._best,
                self._best_iteration,
                Path(self._checkpointer.save_dir, f"{BEST}.pth"),
            )

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, and how many evaluations ago it was."""
        return {
            "metric": self._metric,
            "best": self._best,
            "iteration": self._best_iteration,
            "seen": self._seen,
            "waited": self._waited,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; with another metric, start over."""
        if state["metric"] != self._metric:
            logger.info(
                "CASCADE.BEST_METRIC was %s: the search for the best starts over", state["metric"]
            )
            return
        self._best, self._best_iteration = state["best"], state["iteration"]
        self._seen, self._waited = state["seen"], state["waited"]

    def _stop_if_out_of_patience(self, trainer: TrainingLoop) -> None:
        if 0 < self._patience <= self._waited:
            logger.info(
                "Stopping after iteration %d: %s has not become better than %.4g (iteration %d) in "
                "%d evaluations. Raise CASCADE.PATIENCE, %d now, to train on.",
                trainer.iteration,
                self._metric,
                math.nan if self._best is None else self._best,
                self._best_iteration,
                self._waited,
                self._patience,
            )
            trainer.stop()

    def _warn_once(self, trainer: TrainingLoop) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "CASCADE.BEST_METRIC %r is not among the results, so no best checkpoint is kept. "
                "The results have: %s",
                self._metric,
                ", ".join(name for name, _ in scalars_of(trainer.results)),
            )

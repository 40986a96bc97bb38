"""What happens around the steps of training: checkpoints, evaluation, stopping, writing."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fvcore.common.checkpoint import PeriodicCheckpointer

from cascade_det.engine.checkpoint import Checkpointer
from cascade_det.engine.writers import Writer

if TYPE_CHECKING:
    from cascade_det.engine.trainer import Trainer

logger = logging.getLogger(__name__)


class Hook:
    """Does nothing at any time. A trainer calls its hooks in their order.

    ``after_train`` is called whatever the end was; ``trainer.finished`` tells a good end. A hook
    with a state dict that is not empty finds it again after a resume (one hook of a class).
    """

    def before_train(self, trainer: Trainer) -> None:
        """Before the first step."""

    def after_step(self, trainer: Trainer) -> None:
        """After ``trainer.iteration`` has been completed."""

    def after_train(self, trainer: Trainer) -> None:
        """After the last step, or after an error."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know, as plain types."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""


class PeriodicCheckpoint(Hook):
    """Saves ``model_0004999.pth`` every ``period`` iterations and ``model_final.pth`` at the end.

    Put it before evaluation: an evaluation that fails must not cost the training before it.

    Args:
        checkpointer: tracks the trainer from the start of training on.
        period: iterations between two checkpoints; 0 for the last one only.
        max_to_keep: of the periodic ones, delete all but this many; 0 keeps all.
    """

    def __init__(self, checkpointer: Checkpointer, period: int, max_to_keep: int = 0) -> None:
        self._checkpointer = checkpointer
        self._period = period
        self._max_to_keep = max_to_keep

    def before_train(self, trainer: Trainer) -> None:
        """Track the trainer, which gives it the state of a resumed run."""
        if "trainer" not in self._checkpointer.checkpointables:
            self._checkpointer.add_checkpointable("trainer", trainer)
        self._periodic = PeriodicCheckpointer(
            self._checkpointer,
            self._period if self._period > 0 else trainer.max_iter + 1,
            trainer.max_iter,
            self._max_to_keep or None,
        )
        # The files of the run that is resumed count too.
        self._periodic.recent_checkpoints = self._files_before(trainer.start_iter)

    def after_step(self, trainer: Trainer) -> None:
        """Save when it is time."""
        self._periodic.step(trainer.iteration)

    def after_train(self, trainer: Trainer) -> None:
        """Save the last state of a training that stopped early."""
        stopped_early = trainer.start_iter <= trainer.iteration < trainer.max_iter - 1
        if trainer.finished and stopped_early:
            self._checkpointer.save("model_final", iteration=trainer.iteration)

    def _files_before(self, iteration: int) -> list[str]:
        files = sorted(Path(self._checkpointer.save_dir).glob("model_*.pth"))
        numbers = ((file, re.fullmatch(r"model_(\d{7,})", file.stem)) for file in files)
        return [str(file) for file, number in numbers if number and int(number[1]) < iteration]


class EvalHook(Hook):
    """Evaluates every ``period`` iterations and after the last one, never twice in one place.

    Figures go to the history under names like ``bbox/AP``, and whole into ``trainer.results``.
    Evaluation does not touch the random numbers of training.

    Args:
        period: iterations between two evaluations; 0 for the last one only.
        evaluate: returns results, nested by any depth; figures among them are logged.
    """

    def __init__(self, period: int, evaluate: Callable[[], Mapping[str, Any]]) -> None:
        self._period = period
        self._evaluate = evaluate
        self._evaluated: int | None = None

    def after_step(self, trainer: Trainer) -> None:
        """Evaluate when it is time."""
        done = trainer.iteration + 1
        if self._period > 0 and done % self._period == 0 and done < trainer.max_iter:
            self._run(trainer)

    def after_train(self, trainer: Trainer) -> None:
        """Evaluate the final weights."""
        if trainer.finished and self._evaluated != trainer.iteration:
            self._run(trainer)

    def _run(self, trainer: Trainer) -> None:
        self._evaluated = trainer.iteration
        devices = [trainer.device] if trainer.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            trainer.results = dict(self._evaluate())
        trainer.history.put_all(dict(_figures(trainer.results)), smooth=False)


class EarlyStopping(Hook):
    """Stops after ``patience`` evaluations without a better figure. Put it after evaluation.

    Args:
        best_metric: name in the history, such as ``bbox/AP``; more is better.
        patience: evaluations in a row without improvement that end training; 0 for never.
    """

    def __init__(self, best_metric: str, patience: int) -> None:
        self._metric = best_metric
        self._patience = patience
        self._best, self._best_iteration = -math.inf, -1
        self._waited = 0
        self._warned = False

    def after_step(self, trainer: Trainer) -> None:
        """Look at the figure, if this iteration has one."""
        if self._patience <= 0 or not trainer.results:
            return
        if self._metric not in trainer.history:
            self._warn_once(trainer)
            return
        value, iteration = trainer.history.latest(self._metric)
        if iteration != trainer.iteration:
            return
        # NaN is never greater: it counts as no improvement.
        if value > self._best:
            self._best, self._best_iteration, self._waited = value, iteration, 0
            return
        self._waited += 1
        if self._waited >= self._patience:
            logger.info(
                "Stopping after iteration %d: %s has not risen above %.4g (iteration %d) in %d "
                "evaluations (CASCADE.PATIENCE %d).",
                *(iteration, self._metric, self._best, self._best_iteration),
                *(self._waited, self._patience),
            )
            trainer.stop()

    def state_dict(self) -> dict[str, Any]:
        """The best so far, and how long ago it was."""
        return {"best": self._best, "iteration": self._best_iteration, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on waiting where the last run stopped."""
        self._best, self._best_iteration = state["best"], state["iteration"]
        self._waited = state["waited"]

    def _warn_once(self, trainer: Trainer) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "CASCADE.BEST_METRIC %r is not among the results, so training will not stop early. "
                "There are: %s",
                self._metric,
                ", ".join(name for name, _ in _figures(trainer.results)),
            )


class WriterHook(Hook):
    """Feeds the writers. Put it last, so that they see what the other hooks found.

    Args:
        writers: closed when training ends.
        period: iterations between two writes.
    """

    def __init__(self, writers: Sequence[Writer], period: int = 20) -> None:
        self._writers = writers
        self._period = period

    def after_step(self, trainer: Trainer) -> None:
        """Let the writers see the step, and write when it is time."""
        for writer in self._writers:
            writer.step(trainer.history)
        done = trainer.iteration + 1
        if done % self._period == 0 or done >= trainer.max_iter:
            self._write(trainer)

    def after_train(self, trainer: Trainer) -> None:
        """Write what is left, and close the writers."""
        try:
            self._write(trainer)
        finally:
            for writer in self._writers:
                writer.close()

    def _write(self, trainer: Trainer) -> None:
        history = trainer.history
        # After an error the last iteration has no time.
        if "time" in history and history.latest("time")[1] == trainer.iteration:
            left = trainer.max_iter - trainer.iteration - 1
            history.put("eta_seconds", history.median("time", 1000) * left, smooth=False)
        for writer in self._writers:
            writer.write(history)


def _figures(results: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """``{"bbox": {"AP": 1.0}}`` -> ``("bbox/AP", 1.0)``; what is no figure is passed over."""
    for name, value in results.items():
        if isinstance(value, Mapping):
            yield from _figures(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)

"""Hooks around the steps of training: checkpoints, evaluation and writing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fvcore.common.checkpoint import PeriodicCheckpointer

from cascade_det.engine.checkpoint import Checkpointer
from cascade_det.engine.history import History
from cascade_det.engine.loop import TrainingLoop
from cascade_det.engine.writers import Writer
from cascade_det.parallel import distributed

START, FINAL = "model_start", "model_final"


class Hook:
    """Does nothing; subclasses override what they need. A trainer calls its hooks in order.

    ``after_train`` is called after errors too; ``trainer.finished`` is true after a full run.
    A state dict that is not empty is restored on resume, by the name of the hook's class.
    """

    def before_train(self, trainer: TrainingLoop) -> None:
        """Before the first step."""

    def after_step(self, trainer: TrainingLoop) -> None:
        """After ``trainer.iteration`` has been completed."""

    def after_train(self, trainer: TrainingLoop) -> None:
        """After the last step, or after an error."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain types."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""


class PeriodicCheckpoint(Hook):
    """Saves ``model_0004999.pth`` every ``period`` iterations and ``model_final.pth`` at the end.

    ``model_start.pth`` exists until the first of them does, so that a run can be resumed from the
    beginning. An interrupted run is saved where it stopped. Put this hook before evaluation, so
    that a failing evaluation does not cost the training before it.

    Args:
        checkpointer: tracks the trainer from the start of training on.
        period: iterations between two checkpoints; 0 for the final one only.
        max_to_keep: how many of the periodic ones to keep; ``None`` keeps all.
    """

    def __init__(
        self, checkpointer: Checkpointer, period: int, max_to_keep: int | None = None
    ) -> None:
        self._checkpointer = checkpointer
        self._period = period
        self._max_to_keep = max_to_keep
        self._saved: int | None = None

    def before_train(self, trainer: TrainingLoop) -> None:
        """Track the trainer, which restores the state of a resumed run."""
        if "trainer" not in self._checkpointer.checkpointables:
            self._checkpointer.add_checkpointable("trainer", trainer)
        self._periodic = PeriodicCheckpointer(
            self._checkpointer,
            self._period if self._period > 0 else trainer.max_iter + 1,
            trainer.max_iter,
            # Only the main process deletes files.
            self._max_to_keep if distributed.is_main() else None,
        )
        # The files of the resumed run count too.
        self._periodic.recent_checkpoints = self._files_before(trainer.start_iter)
        if trainer.start_iter == 0:
            self._checkpointer.save(START, iteration=-1)
        self._record_save(trainer.start_iter - 1, trainer)
        if trainer.start_iter == trainer.max_iter and not self._is_final(trainer):
            # Killed between the two saves after the last step: the second follows, before
            # evaluation and writers change what it holds.
            self._checkpointer.save(FINAL, iteration=trainer.iteration)
            self._record_save(trainer.iteration, trainer)

    def after_step(self, trainer: TrainingLoop) -> None:
        """Save at the end of a period."""
        # Hooks whose state cannot be recomputed come before this one.
        trainer.resumable = distributed.world_size() == 1
        done = trainer.iteration + 1
        if done >= trainer.max_iter or (self._period > 0 and done % self._period == 0):
            self._periodic.step(trainer.iteration)
            self._record_save(trainer.iteration, trainer)

    def after_train(self, trainer: TrainingLoop) -> None:
        """Save the state of a training that ended early."""
        is_saved = trainer.iteration == self._saved
        if trainer.finished:
            name = FINAL
            is_saved = is_saved and self._is_final(trainer)
        else:
            name = f"model_{trainer.iteration:07d}"
        if not is_saved and (trainer.finished or trainer.resumable):
            self._checkpointer.save(name, iteration=trainer.iteration)
            self._record_save(trainer.iteration, trainer)

    def _record_save(self, iteration: int, trainer: TrainingLoop) -> None:
        self._saved = iteration
        # Other processes might look for the file before the main one has written it.
        trainer.last_checkpoint = distributed.on_main(self._checkpointer.get_checkpoint_file)
        if iteration >= 0 and distributed.is_main():
            Path(self._checkpointer.save_dir, f"{START}.pth").unlink(missing_ok=True)

    def _is_final(self, trainer: TrainingLoop) -> bool:
        return Path(trainer.last_checkpoint or "").stem == FINAL

    def _files_before(self, iteration: int) -> list[str]:
        files = sorted(Path(self._checkpointer.save_dir).glob("model_*.pth"))
        numbers = ((file, re.fullmatch(r"model_(\d{7,})", file.stem)) for file in files)
        return [str(file) for file, number in numbers if number and int(number[1]) < iteration]


class EvalHook(Hook):
    """Evaluates every ``period`` iterations and after the last one, never twice at one iteration.

    The metrics go to the history under names like ``bbox/AP``, and as returned into
    ``trainer.results``. Evaluation does not change the random state of training. A run that was
    stopped between a checkpoint and its evaluation starts with that evaluation when resumed.

    Args:
        period: iterations between two evaluations; 0 for the last one only.
        evaluate: returns results, nested to any depth; the numbers among them are logged.
    """

    def __init__(self, period: int, evaluate: Callable[[], Mapping[str, Any]]) -> None:
        self._period = period
        self._evaluate = evaluate
        self._evaluated: int | None = None

    def before_train(self, trainer: TrainingLoop) -> None:
        """Run an evaluation that the previous run missed."""
        if trainer.start_iter > 0:
            self.after_step(trainer)

    def after_step(self, trainer: TrainingLoop) -> None:
        """Evaluate at the end of a period."""
        done = trainer.iteration + 1
        is_time = self._period > 0 and done % self._period == 0 and done < trainer.max_iter
        if is_time and self._evaluated != trainer.iteration:
            self._evaluate_now(trainer)

    def after_train(self, trainer: TrainingLoop) -> None:
        """Evaluate the final weights."""
        if trainer.finished and self._evaluated != trainer.iteration:
            self._evaluate_now(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The iteration of the last evaluation."""
        return {} if self._evaluated is None else {"evaluated": self._evaluated}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._evaluated = state["evaluated"]

    def _evaluate_now(self, trainer: TrainingLoop) -> None:
        devices = [trainer.device] if trainer.device.type == "cuda" else []
        with trainer.interruptible(), torch.random.fork_rng(devices):
            trainer.results = dict(self._evaluate())
        self._evaluated = trainer.iteration
        trainer.history.put_all(dict(scalars_of(trainer.results)), smooth=False)


class WriterHook(Hook):
    """Feeds the writers of the standalone host. Put it last: it writes what other hooks measured.

    Args:
        writers: closed when training ends.
        period: iterations between two writes.
    """

    def __init__(self, writers: Sequence[Writer], period: int) -> None:
        self._writers = writers
        self._period = period
        self._written = -1

    def before_train(self, trainer: TrainingLoop) -> None:
        """Drop what the previous run wrote after its last checkpoint: it will be written again."""
        for writer in self._writers:
            writer.resume(self._written)
        if trainer.start_iter > 0 and self._is_time(trainer):
            self._write(trainer)

    def after_step(self, trainer: TrainingLoop) -> None:
        """Pass the step to the writers, and write at the end of a period."""
        for writer in self._writers:
            writer.step(_full_history(trainer))
        if self._is_time(trainer):
            self._write(trainer)

    def after_train(self, trainer: TrainingLoop) -> None:
        """Write what is left, and close the writers."""
        try:
            self._write(trainer)
        finally:
            for writer in self._writers:
                writer.close()

    def state_dict(self) -> dict[str, Any]:
        """The last iteration that was written."""
        return {"written": self._written}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._written = state["written"]

    def _is_time(self, trainer: TrainingLoop) -> bool:
        done = trainer.iteration + 1
        return done % self._period == 0 or done >= trainer.max_iter

    def _write(self, trainer: TrainingLoop) -> None:
        history = _full_history(trainer)
        # An iteration that failed has no time.
        if "time" in history and history.latest("time")[1] == trainer.iteration:
            left = trainer.max_iter - trainer.iteration - 1
            history.put("eta_seconds", history.median("time", 1000) * left, smooth=False)
        for writer in self._writers:
            writer.write(history)
        self._written = trainer.iteration


def _full_history(trainer: TrainingLoop) -> History:
    assert isinstance(trainer.history, History)
    return trainer.history


def scalars_of(results: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested results, as ``("bbox/AP", 1.0)``; other values are skipped."""
    for name, value in results.items():
        if isinstance(value, Mapping):
            yield from scalars_of(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)

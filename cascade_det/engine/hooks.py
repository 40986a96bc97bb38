"""What happens around the steps of training: checkpoints, evaluation, stopping, writing."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fvcore.common.checkpoint import PeriodicCheckpointer

from cascade_det.engine.checkpoint import Checkpointer
from cascade_det.engine.writers import Writer
from cascade_det.parallel import distributed

if TYPE_CHECKING:
    from cascade_det.engine.trainer import Trainer

logger = logging.getLogger(__name__)

START, FINAL = "model_start", "model_final"


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

    ``model_start.pth`` is there until the first of them is, so that a run can be resumed from its
    first moment on. An interrupted run is saved where it stopped. Put it before evaluation: an
    evaluation that fails must not cost the training before it.

    Args:
        checkpointer: tracks the trainer from the start of training on.
        period: iterations between two checkpoints; 0 for the last one only.
        max_to_keep: of the periodic ones, delete all but this many; 0 keeps all.
    """

    def __init__(self, checkpointer: Checkpointer, period: int, max_to_keep: int = 0) -> None:
        self._checkpointer = checkpointer
        self._period = period
        self._max_to_keep = max_to_keep
        self._saved: int | None = None

    def before_train(self, trainer: Trainer) -> None:
        """Track the trainer, which gives it the state of a resumed run."""
        if "trainer" not in self._checkpointer.checkpointables:
            self._checkpointer.add_checkpointable("trainer", trainer)
        self._periodic = PeriodicCheckpointer(
            self._checkpointer,
            self._period if self._period > 0 else trainer.max_iter + 1,
            trainer.max_iter,
            # One process deletes files for all.
            (self._max_to_keep or None) if distributed.is_main() else None,
        )
        # The files of the run that is resumed count too.
        self._periodic.recent_checkpoints = self._files_before(trainer.start_iter)
        if trainer.start_iter == 0:
            self._checkpointer.save(START, iteration=-1)
        self._note(trainer.start_iter - 1, trainer)

    def after_step(self, trainer: Trainer) -> None:
        """Save when it is time."""
        # Hooks with a state that cannot be made up for come before this one.
        trainer.resumable = distributed.world_size() == 1
        done = trainer.iteration + 1
        if done >= trainer.max_iter or (self._period > 0 and done % self._period == 0):
            self._periodic.step(trainer.iteration)
            self._note(trainer.iteration, trainer)

    def after_train(self, trainer: Trainer) -> None:
        """Save the last state of a training that ended before its time."""
        is_saved = trainer.iteration == self._saved
        if trainer.finished:
            name = FINAL
            is_saved = is_saved and Path(trainer.last_checkpoint or "").stem == FINAL
        else:
            name = f"model_{trainer.iteration:07d}"
        if not is_saved and (trainer.finished or trainer.resumable):
            self._checkpointer.save(name, iteration=trainer.iteration)
            self._note(trainer.iteration, trainer)

    def _note(self, saved: int, trainer: Trainer) -> None:
        self._saved = saved
        # The others might look for the file before the main process has written it.
        newest = self._checkpointer.get_checkpoint_file() if distributed.is_main() else ""
        trainer.last_checkpoint = distributed.broadcast(newest)
        if saved >= 0 and distributed.is_main():
            Path(self._checkpointer.save_dir, f"{START}.pth").unlink(missing_ok=True)

    def _files_before(self, iteration: int) -> list[str]:
        files = sorted(Path(self._checkpointer.save_dir).glob("model_*.pth"))
        numbers = ((file, re.fullmatch(r"model_(\d{7,})", file.stem)) for file in files)
        return [str(file) for file, number in numbers if number and int(number[1]) < iteration]


class EvalHook(Hook):
    """Evaluates every ``period`` iterations and after the last one, never twice in one place.

    Figures go to the history under names like ``bbox/AP``, and whole into ``trainer.results``.
    Evaluation does not touch the random numbers of training. A run that was stopped between a
    checkpoint and its evaluation begins with that evaluation when it is resumed.

    Args:
        period: iterations between two evaluations; 0 for the last one only.
        evaluate: returns results, nested by any depth; figures among them are logged.
    """

    def __init__(self, period: int, evaluate: Callable[[], Mapping[str, Any]]) -> None:
        self._period = period
        self._evaluate = evaluate
        self._evaluated: int | None = None

    def before_train(self, trainer: Trainer) -> None:
        """Catch up on the evaluation that the run before did not come to."""
        if trainer.start_iter > 0:
            self.after_step(trainer)

    def after_step(self, trainer: Trainer) -> None:
        """Evaluate when it is time."""
        done = trainer.iteration + 1
        is_time = self._period > 0 and done % self._period == 0 and done < trainer.max_iter
        if is_time and self._evaluated != trainer.iteration:
            self._run(trainer)

    def after_train(self, trainer: Trainer) -> None:
        """Evaluate the final weights."""
        if trainer.finished and self._evaluated != trainer.iteration:
            self._run(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The iteration that was evaluated last."""
        return {} if self._evaluated is None else {"evaluated": self._evaluated}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Know what was evaluated before."""
        self._evaluated = state["evaluated"]

    def _run(self, trainer: Trainer) -> None:
        devices = [trainer.device] if trainer.device.type == "cuda" else []
        with trainer.interruptible(), torch.random.fork_rng(devices):
            trainer.results = dict(self._evaluate())
        self._evaluated = trainer.iteration
        trainer.history.put_all(dict(scalars_of(trainer.results)), smooth=False)


class WriterHook(Hook):
    """Feeds the writers. Put it last, so that they see what the other hooks found.

    Args:
        writers: closed when training ends.
        period: iterations between two writes.
    """

    def __init__(self, writers: Sequence[Writer], period: int = 20) -> None:
        self._writers = writers
        self._period = period
        self._written = -1

    def before_train(self, trainer: Trainer) -> None:
        """Take back what the run before wrote after its last checkpoint: it comes again."""
        for writer in self._writers:
            writer.resume(self._written)
        if trainer.start_iter > 0 and self._is_time(trainer):
            self._write(trainer)

    def after_step(self, trainer: Trainer) -> None:
        """Let the writers see the step, and write when it is time."""
        for writer in self._writers:
            writer.step(trainer.history)
        if self._is_time(trainer):
            self._write(trainer)

    def after_train(self, trainer: Trainer) -> None:
        """Write what is left, and close the writers."""
        try:
            self._write(trainer)
        finally:
            for writer in self._writers:
                writer.close()

    def state_dict(self) -> dict[str, Any]:
        """Until which iteration everything was written."""
        return {"written": self._written}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Know until where the run before wrote."""
        self._written = state["written"]

    def _is_time(self, trainer: Trainer) -> bool:
        done = trainer.iteration + 1
        return done % self._period == 0 or done >= trainer.max_iter

    def _write(self, trainer: Trainer) -> None:
        history = trainer.history
        # After an error the last iteration has no time.
        if "time" in history and history.latest("time")[1] == trainer.iteration:
            left = trainer.max_iter - trainer.iteration - 1
            history.put("eta_seconds", history.median("time", 1000) * left, smooth=False)
        for writer in self._writers:
            writer.write(history)
        self._written = trainer.iteration


def scalars_of(results: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The figures in nested results, as ``("bbox/AP", 1.0)``; what is no figure is passed over."""
    for name, value in results.items():
        if isinstance(value, Mapping):
            yield from scalars_of(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)

"""Checkpoints, written atomically, and resuming from the last one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from fvcore.common import checkpoint as fvcore_checkpoint
from torch import nn

from cascade_det.errors import CheckpointError
from cascade_det.files import atomic_path
from cascade_det.text import listed
from cascade_det.weights import check_finite, differing_shapes, load_torch_file, load_weights

LAST = "last_checkpoint"
# Raised when a state is loaded into the wrong object; CheckpointErrors are ValueErrors.
DOES_NOT_FIT = (AttributeError, LookupError, TypeError, ValueError, RuntimeError)


def newest_checkpoint(folder: str | Path) -> str:
    """The path of the newest checkpoint in a folder; empty where there is none.

    Raises:
        CheckpointError: ``last_checkpoint`` holds no name of a file beside it.
    """
    last = Path(folder) / LAST
    try:
        name = last.read_bytes().decode().strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError):
        name = ""
    if not name or name in (".", "..") or "\0" in name or Path(name).name != name:
        raise CheckpointError(
            f"{last}: holds no name of a checkpoint. Write into it the name of the one in {folder} "
            "to continue from, such as model_0004999.pth."
        )
    return str(Path(folder) / name)


def checkpoint_to_resume(folder: str | Path) -> str:
    """As :func:`newest_checkpoint`.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    if file := newest_checkpoint(folder):
        return file
    files = sorted(file.name for file in Path(folder).glob("*.pth"))
    found = f"only {', '.join(files[:5])} without {LAST}" if files else "no checkpoint"
    raise CheckpointError(
        f"--resume: there is nothing to resume in OUTPUT_DIR {folder}: it has {found}. Start "
        "without --resume, or give the OUTPUT_DIR of the run to continue."
    )


class Checkpointer(fvcore_checkpoint.Checkpointer):
    """fvcore's checkpointer with atomic writes, and loading that executes nothing.

    A checkpoint is a dict of plain types and tensors: ``"model"``, one entry for each
    checkpointable, and ``"iteration"``, the last one that was completed.

    Args:
        model: its state dict is saved under ``"model"``.
        save_dir: an existing folder.
        save_to_disk: ``False`` makes :meth:`save` collect the state but write nothing: several
            processes all save, and one writes.
        checkpointables: objects with ``state_dict()`` and ``load_state_dict()``. The trainer,
            which :class:`~cascade_det.engine.hooks.PeriodicCheckpoint` adds, covers optimiser,
            schedule, loss scaling, random numbers, history and hooks.

    Attributes:
        start_iter: where training continues: 0, or one after the resumed checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str | Path,
        *,
        save_to_disk: bool = True,
        **checkpointables: Any,
    ) -> None:
        self.start_iter = 0
        self._resumed: dict[str, Any] = {}
        super().__init__(model, str(save_dir), save_to_disk=save_to_disk, **checkpointables)

    def add_checkpointable(self, key: str, checkpointable: Any) -> None:
        """Track one more object; after a resume its state is restored at once.

        So loader and trainer can be built after the iteration to start with is known.
        """
        super().add_checkpointable(key, checkpointable)
        self.load_resumed(key, checkpointable)

    def load_resumed(self, key: str, checkpointable: Any) -> None:
        """Restore an object's state from the resumed checkpoint, if that has one, untracked.

        Raises:
            CheckpointError: the state does not fit.
        """
        if key not in self._resumed:
            return
        try:
            checkpointable.load_state_dict(self._resumed.pop(key))
        except DOES_NOT_FIT as error:
            raise CheckpointError(
                f"{self.get_checkpoint_file()}: its {key!r} does not fit this run ({error}). "
                "Resume with the configuration that it was written with, or start without resuming."
            ) from error

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name.pth`` atomically.

        Raises:
            CheckpointError: the file cannot be written, for example because the disk is full.
        """
        states = {key: object_.state_dict() for key, object_ in self.checkpointables.items()}
        if self._write(name, {"model": self.model.state_dict(), **states, **kwargs}):
            self.tag_last_checkpoint(f"{name}.pth")

    def save_weights(self, name: str, **kwargs: Any) -> None:
        """Write ``name.pth`` without the state of training; ``last_checkpoint`` stays.

        Raises:
            CheckpointError: see :meth:`save`.
        """
        run = self.checkpointables.get("run")
        info = {} if run is None else {"run": run.state_dict()}
        self._write(name, {"model": self.model.state_dict(), **info, **kwargs})

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write the name of the newest checkpoint to ``last_checkpoint``."""
        with atomic_path(Path(self.save_dir) / LAST) as temporary:
            temporary.write_text(last_filename_basename)

    def get_checkpoint_file(self) -> str:
        """The path of the newest checkpoint; empty where there is none.

        Raises:
            CheckpointError: ``last_checkpoint`` holds no name of a file beside it.
        """
        return newest_checkpoint(self.save_dir)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a checkpoint of this model; see :meth:`resume_or_load` for other weights.

        Args:
            path: a file that :meth:`save` wrote.
            checkpointables: which of the objects to load; ``None`` for all.

        Returns:
            The other entries of the checkpoint.

        Raises:
            CheckpointError: the file is missing, damaged, of another model or optimiser, or its
                weights are NaN or Inf.
        """
        if not os.path.isfile(path):
            raise CheckpointError(
                f"{path}: no such checkpoint. Delete {Path(self.save_dir) / 'last_checkpoint'}, or "
                "write into it the name of a checkpoint that is there."
            )
        try:
            return super().load(path, checkpointables)
        except CheckpointError:
            raise
        except DOES_NOT_FIT as error:
            raise CheckpointError(
                f"{path}: does not belong to this model and optimiser ({error}). Resume with the "
                "configuration that it was written with, or start without resuming."
            ) from error

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resume from the last checkpoint, or load weights only.

        Args:
            path: file of weights for a start; empty for a start from the initialisation.
            resume: resume from the last checkpoint; ``path`` is ignored then.

        Returns:
            The entries of the resumed checkpoint besides the checkpointables; empty for a start.

        Raises:
            CheckpointError: there is nothing to resume; else see :meth:`load` and
                :func:`cascade_det.weights.load_weights`.
        """
        self.start_iter, self._resumed = 0, {}
        if resume:
            file = checkpoint_to_resume(self.save_dir)
            self._resumed = self.load(file)
            iteration = self._resumed.get("iteration")
            if not isinstance(iteration, int) or iteration < -1:
                raise CheckpointError(
                    f"{file}: holds weights, but no training to continue (its 'iteration' is "
                    f"{iteration!r}). Give it as MODEL.WEIGHTS, without --resume."
                )
            self.start_iter = iteration + 1
            self.logger.info("Resuming at iteration %d", self.start_iter)
        elif path:
            load_weights(self.model, path)
        else:
            self.logger.info("No weights given: starting from the initialisation")
        return self._resumed

    def _write(self, name: str, data: dict[str, Any]) -> bool:
        if not self.save_to_disk:
            return False
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info("Saving checkpoint to %s", path)
        try:
            with atomic_path(path) as temporary:
                torch.save(data, temporary)
        # torch reports a full disk as a RuntimeError.
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: cannot be written ({error}). Is the disk full? Free some space and "
                f"continue with --resume, from {self.get_checkpoint_file() or 'no checkpoint yet'}."
            ) from error
        return True

    def _load_file(self, f: str) -> dict[str, Any]:
        content = load_torch_file(Path(f))
        if not isinstance(content, dict) or "model" not in content:
            raise CheckpointError(f"{f}: is not a checkpoint: it has no entry 'model'.")
        if isinstance(content["model"], dict):  # fvcore refuses others
            tensors = {k: v for k, v in content["model"].items() if isinstance(v, torch.Tensor)}
            check_finite(f, tensors)
        return content

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """Raise where fvcore only warns: a resumed model needs all its weights."""
        differing = {name: shapes for name, *shapes in incompatible.incorrect_shapes}
        issues = differing_shapes(differing)
        # fvcore skips tensors of another shape, so they count as missing too.
        missing = [name for name in incompatible.missing_keys if name not in differing]
        issues += [f"{name} is only in the model" for name in missing]
        issues += [f"{name} is only in the file" for name in incompatible.unexpected_keys]
        if issues:
            raise ValueError(listed(issues, 5, "; "))

"""Checkpoints that are whole or not there, and resuming from the last one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fvcore.common import checkpoint as fvcore_checkpoint
from torch import nn

from cascade_det.engine.weight_files import load_torch_file
from cascade_det.engine.weights import load_weights
from cascade_det.errors import CheckpointError
from cascade_det.files import atomic_path


class Checkpointer(fvcore_checkpoint.Checkpointer):
    """fvcore's checkpointer, which writes atomically and executes nothing when it loads.

    A checkpoint is a dict of plain types and tensors: ``"model"``, one entry for each
    checkpointable, and ``"iteration"``, the last one that was completed.

    Args:
        model: its state dict is saved under ``"model"``.
        save_dir: an existing folder.
        save_to_disk: ``False`` makes :meth:`save` do nothing.
        checkpointables: objects with ``state_dict()`` and ``load_state_dict()``. The trainer,
            which :class:`~cascade_det.engine.hooks.PeriodicCheckpoint` adds, covers optimiser,
            schedule, loss scaling, random numbers, history and hooks.

    Attributes:
        start_iter: where training goes on: 0, or one after the checkpoint that was resumed.
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
        """Track one more object; after a resume it is given its state at once.

        That lets the loader and the trainer be built when the iteration to start with is known.
        """
        super().add_checkpointable(key, checkpointable)
        if key not in self._resumed:
            return
        try:
            checkpointable.load_state_dict(self._resumed.pop(key))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.get_checkpoint_file()}: its {key!r} does not fit this run ({error}). "
                "Resume with the configuration that it was written with, or start without resuming."
            ) from error

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name.pth``; an earlier file of that name is there, whole, until this one is."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: object_.state_dict() for key, object_ in self.checkpointables.items()})
        data.update(kwargs)
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info("Saving checkpoint to %s", path)
        with atomic_path(path) as temporary:
            torch.save(data, temporary)
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write the name of the newest checkpoint to ``last_checkpoint``."""
        with atomic_path(Path(self.save_dir) / "last_checkpoint") as temporary:
            temporary.write_text(last_filename_basename)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a checkpoint of this very model; see :meth:`resume_or_load` for other weights.

        Args:
            path: a file that :meth:`save` wrote.
            checkpointables: which of the objects to load; ``None`` for all.

        Returns:
            What the checkpoint holds beyond them.

        Raises:
            CheckpointError: the file is missing, damaged, or of another model or optimiser.
        """
        if not Path(path).is_file():
            raise CheckpointError(
                f"{path}: no such checkpoint. Delete {Path(self.save_dir) / 'last_checkpoint'}, or "
                "write into it the name of a checkpoint that is there."
            )
        try:
            return super().load(path, checkpointables)
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: does not belong to this model and optimiser ({error}). Resume with the "
                "configuration that it was written with, or start without resuming."
            ) from error

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Go on from the last checkpoint if there is one; else load weights only.

        Args:
            path: file of weights for a start; empty for a start from the initialisation.
            resume: whether to look for a last checkpoint.

        Returns:
            What the resumed checkpoint holds beyond the checkpointables; empty for a start.

        Raises:
            CheckpointError: see :meth:`load` and :func:`cascade_det.engine.weights.load_weights`.
        """
        self.start_iter, self._resumed = 0, {}
        if resume and self.has_checkpoint():
            self._resumed = self.load(self.get_checkpoint_file())
            self.start_iter = int(self._resumed.get("iteration", -1)) + 1
            self.logger.info("Resuming at iteration %d", self.start_iter)
        elif path:
            load_weights(self.model, path)
        else:
            self.logger.info("No weights given: starting from the initialisation")
        return self._resumed

    def _load_file(self, f: str) -> dict[str, Any]:
        content = load_torch_file(Path(f))
        if not isinstance(content, dict) or "model" not in content:
            raise CheckpointError(f"{f}: is no checkpoint, it has no entry 'model'.")
        return content

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """Raise, where fvcore warns: a resumed model that lacks weights is no resumed model."""
        problems = [f"{name} is missing" for name in incompatible.missing_keys]
        problems += [f"{name} is not in the model" for name in incompatible.unexpected_keys]
        problems += [
            f"{name} is {in_file}, the model's is {in_model}"
            for name, in_file, in_model in incompatible.incorrect_shapes
        ]
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ValueError("; ".join(problems[:5]) + more)

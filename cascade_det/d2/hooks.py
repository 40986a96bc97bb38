"""The engine's hooks as hooks of Detectron2, and Detectron2's writers."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)

from cascade_det.engine.history import WINDOW
from cascade_det.engine.hooks import Hook
from cascade_det.engine.training_state import load_scheduler_state

logger = logging.getLogger(__name__)


class StorageHistory:
    """``EventStorage`` with the interface of :class:`cascade_det.engine.history.History`.

    Args:
        storage: of a training.
        last: the last completed iteration; later values count as its.
    """

    def __init__(self, storage: EventStorage, last: int) -> None:
        self._storage = storage
        self._last = last

    def __contains__(self, name: str) -> bool:
        return name in self._storage.latest()

    def __iter__(self) -> Iterator[str]:
        return iter(self._storage.latest())

    def latest(self, name: str) -> tuple[float, int]:
        """The last value of ``name`` and its iteration."""
        value, iteration = self._storage.latest()[name]
        return value, min(iteration, self._last)

    def smoothed(self, name: str) -> float:
        """The median of the last values of a noisy scalar, else the last value."""
        return float(self._storage.latest_with_smoothing_hint(WINDOW)[name][0])

    def put_all(self, values: Mapping[str, float], *, smooth: bool = True) -> None:
        """Store values; writers show a median of those with ``smooth``."""
        self._storage.put_scalars(**values, smoothing_hint=smooth)


class LearningRate(hooks.LRScheduler):
    """Detectron2's hook, which resumes the position in the schedule but not the rates."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue at the checkpoint's iteration with the rates of the configuration."""
        load_scheduler_state(self.scheduler, state_dict)


class Printer(CommonMetricPrinter):
    """Detectron2's printer, which would divide by zero if it printed an iteration twice."""

    _printed = -1

    def write(self) -> None:
        """Log losses, learning rate and times once per iteration."""
        iteration = get_event_storage().iter
        if iteration != self._printed:
            super().write()
        self._printed = iteration


def build_writers(output_dir: str | Path, max_iter: int) -> list[EventWriter]:
    """Detectron2's writers; without tensorboard installed, a log line says so.

    Args:
        output_dir: created if missing.
        max_iter: iterations of the whole training.
    """
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    writers = [Printer(max_iter), JSONWriter(str(Path(output_dir, "metrics.json")))]
    if importlib.util.find_spec("tensorboard") is None:
        logger.info("No TensorBoard files: tensorboard is missing (pip install tensorboard).")
        return writers
    return [*writers, TensorboardXWriter(str(output_dir))]


def as_detectron2_hook(hook: Hook) -> HookBase:
    """Wrap a hook of the engine; its state is saved under its own class name."""
    return type(type(hook).__name__, (_Adapted,), {})(hook)


class _Adapted(HookBase):
    def __init__(self, hook: Hook) -> None:
        self._hook = hook

    def before_train(self) -> None:
        self._hook.before_train(self.trainer)

    def after_step(self) -> None:
        self._hook.after_step(self.trainer)

    def after_train(self) -> None:
        self._hook.after_train(self.trainer)

    def state_dict(self) -> dict[str, Any]:
        return self._hook.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._hook.load_state_dict(state)

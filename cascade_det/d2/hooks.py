"""The engine's hooks among those of Detectron2, and its writers."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
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

from cascade_det.engine.hooks import Hook
from cascade_det.engine.training_state import load_scheduler_state

logger = logging.getLogger(__name__)


class StorageHistory:
    """Detectron2's storage of events, read as :class:`cascade_det.engine.events.History` is.

    Args:
        storage: of a training.
        last: the iteration that was completed last; what comes after it counts as part of it.
    """

    def __init__(self, storage: EventStorage, last: int) -> None:
        self._storage = storage
        self._last = last

    def __contains__(self, name: str) -> bool:
        return name in self._storage.latest()

    def latest(self, name: str) -> tuple[float, int]:
        """The last value of ``name``, and its iteration."""
        value, iteration = self._storage.latest()[name]
        return value, min(iteration, self._last)

    def put_all(self, values: Mapping[str, float], *, smooth: bool = True) -> None:
        """File values; ``smooth`` says whether writers should show a median."""
        self._storage.put_scalars(**values, smoothing_hint=smooth)


class LearningRate(hooks.LRScheduler):
    """Detectron2's hook, that takes the place in the schedule from a checkpoint, not the rates."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on at the iteration of the checkpoint, with the rates of the configuration."""
        load_scheduler_state(self.scheduler, state_dict)


class Printer(CommonMetricPrinter):
    """Detectron2's, that divides by zero where a run ends early and a line would come twice."""

    _printed = -1

    def write(self) -> None:
        """Log losses, rate and times, unless this iteration has been logged."""
        iteration = get_event_storage().iter
        if iteration != self._printed:
            super().write()
        self._printed = iteration


def build_writers(output_dir: str | Path, max_iter: int) -> list[EventWriter]:
    """Detectron2's writers; where tensorboard is not installed, one log line in place of its.

    Args:
        output_dir: made if needed.
        max_iter: iterations of the whole training.
    """
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    writers = [Printer(max_iter), JSONWriter(str(Path(output_dir, "metrics.json")))]
    if importlib.util.find_spec("tensorboard") is None:
        logger.info("No TensorBoard files: tensorboard is missing (pip install tensorboard).")
        return writers
    return [*writers, TensorboardXWriter(str(output_dir))]


def as_detectron2_hook(hook: Hook) -> HookBase:
    """One of the engine's hooks, for a trainer of Detectron2 that has what it looks at.

    Its state is kept under its own name.
    """
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

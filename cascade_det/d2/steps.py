"""The engine's step as the part of Detectron2's trainer that goes on with batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from detectron2.engine import SimpleTrainer, TrainerBase
from detectron2.utils.events import get_event_storage

from cascade_det.engine.step import TrainingStep
from cascade_det.engine.training_state import load_optimizer_state, optimizer_state


class Steps(SimpleTrainer):
    """The engine's step where Detectron2 has its own; its loader is built when training begins."""

    def __init__(self, step: TrainingStep) -> None:
        super().__init__(step.detector, None, step.optimizer)
        self.step = step
        self._data_time = 0.0

    def next_batch(self) -> Any:
        """The next batch of the loader."""
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        self._data_time = time.perf_counter() - start
        return batch

    def run_batch(
        self, batch: Any, *, interrupted: bool, last_checkpoint: Callable[[], str]
    ) -> bool:
        """Train on a batch; whether any process was asked to stop."""
        figures, stop = self.step.run(
            batch, self.iter, interrupted=interrupted, last_checkpoint=last_checkpoint
        )
        # The heads have put theirs into the storage themselves.
        own = self.step.metrics()
        rest = {name: value for name, value in figures.items() if name not in own}
        get_event_storage().put_scalars(data_time=self._data_time, **rest)
        return stop

    def state_dict(self) -> dict[str, Any]:
        """What goes on after a resume."""
        state = TrainerBase.state_dict(self)
        optimizer = optimizer_state(self.optimizer, self.step.module)
        return {**state, "optimizer": optimizer, "scaler": self.step.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`, with the settings of the configuration."""
        TrainerBase.load_state_dict(self, state)
        load_optimizer_state(self.optimizer, self.step.module, state["optimizer"])
        self.step.load_state_dict(state["scaler"])

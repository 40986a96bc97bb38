"""The training loop: iterations, hooks, interrupts."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from cascade_det.engine.batches import Batch
from cascade_det.engine.events import History
from cascade_det.engine.hooks import Hook
from cascade_det.engine.run_control import RunControl
from cascade_det.engine.solver import GradientClipper
from cascade_det.engine.step import TrainingStep
from cascade_det.engine.training_modes import training_mode
from cascade_det.engine.training_state import (
    load_optimizer_state,
    load_scheduler_state,
    optimizer_state,
    own_random_state,
    random_state,
    set_random_state,
)
from cascade_det.parallel import distributed
from cascade_det.parallel.interrupts import InterruptRequest, interrupt_request

logger = logging.getLogger(__name__)


class Trainer(RunControl):
    """Trains a detector for a number of iterations.

    Args:
        detector: called with a batch, returns a dict of scalar losses to be summed, see
            :class:`~cascade_det.engine.step.TrainingStep`.
        loader: batches without end, of each process its share; the first is that of
            ``start_iter``.
        optimizer: of the detector's parameters.
        scheduler: stepped after every iteration.
        max_iter: iterations of the whole training, those before ``start_iter`` included.
        start_iter: how many are done already.
        hooks: called in this order, see :class:`Hook`.
        amp_dtype: these and the following are those of the step.
        clip_gradients: likewise.
        accumulation_steps: likewise.
        device: likewise.
        output_dir: likewise.

    Attributes:
        step: what an iteration does.
        iteration: the iteration that runs, or was completed last; from 0.
        start_iter: the first one of this run.
        max_iter: one more than the last one.
        history: losses (``total_loss`` and each one), ``gradient_norm``, ``lr``, ``time`` and
            ``data_time`` in seconds per iteration, the detector's ``metrics`` and what hooks add.
            Losses and metrics are means over the processes.
        results: of the last evaluation; empty before it.
        finished: whether training came to a good end, by ``max_iter`` or by :meth:`stop`.
        last_checkpoint: the newest file that was saved or resumed, for messages.
    """

    def __init__(
        self,
        detector: nn.Module,
        loader: Iterable[Batch],
        optimizer: Optimizer,
        scheduler: LambdaLR,
        *,
        max_iter: int,
        start_iter: int = 0,
        hooks: Sequence[Hook] = (),
        amp_dtype: torch.dtype | str | None = None,
        clip_gradients: GradientClipper | None = None,
        accumulation_steps: int = 1,
        device: torch.device | str = "cpu",
        output_dir: str | Path | None = None,
    ) -> None:
        self.step = TrainingStep(
            detector,
            optimizer,
            amp_dtype=amp_dtype,
            clip_gradients=clip_gradients,
            accumulation_steps=accumulation_steps,
            max_iter=max_iter,
            device=device,
            output_dir=output_dir,
        )
        self.detector = detector
        self.loader = loader
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.max_iter = max_iter
        self.start_iter = start_iter
        self.iteration = start_iter - 1
        self.hooks = list(hooks)
        self.device = torch.device(device)
        self.history = History()
        self.results: dict[str, Any] = {}
        self.finished = False
        self.last_checkpoint: str | None = None
        self._interrupt = InterruptRequest()
        self._resumed_random: Mapping[str, Any] | None = None

    def train(self) -> None:
        """Run from ``start_iter`` to ``max_iter``, or until :meth:`stop`.

        Raises:
            FloatingPointError: losses, gradients or boxes are not finite; the weights are as
                before that iteration.
            Interrupted: a signal asked for an end; the hooks have saved a checkpoint.
            RuntimeError: the loader ended.
        """
        self.finished = self.resumable = self._stopping = False
        self.history.iteration = max(self.iteration, 0)
        training_mode(self.detector)
        with interrupt_request() as self._interrupt, ExitStack() as ends:
            # Every hook gets its end, in their order, even if an earlier one fails at its own.
            for hook in reversed(self.hooks):
                ends.callback(hook.after_train, self)
            for hook in self.hooks:
                hook.before_train(self)
            # A hook may know that nothing is left to do.
            if not self._stopping:
                self._run()
            self.finished = True

    def state_dict(self) -> dict[str, Any]:
        """What goes on after a resume beside the weights, as plain types.

        Every process has to call it: each one's random numbers are in it.
        """
        hooks = {type(hook).__name__: hook.state_dict() for hook in self.hooks}
        return {
            "optimizer": optimizer_state(self.optimizer, self.step.module),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.step.state_dict(),
            # Before its first step a resumed run has not taken up its random numbers yet.
            "random": distributed.all_gather(self._resumed_random or random_state()),
            "history": self.history.state_dict(),
            "hooks": {name: state for name, state in hooks.items() if state},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`. ``start_iter`` is given to the constructor."""
        load_optimizer_state(self.optimizer, self.step.module, state["optimizer"])
        load_scheduler_state(self.scheduler, state["scheduler"])
        self.step.load_state_dict(state["scaler"])
        self.history.load_state_dict(state["history"])
        for hook in self.hooks:
            if type(hook).__name__ in state["hooks"]:
                hook.load_state_dict(state["hooks"][type(hook).__name__])
        # Starting the loader draws from the same generator: set it when that is over.
        self._resumed_random = own_random_state(state["random"])

    def _run(self) -> None:
        if self._is_complete():
            return
        batches = iter(self.loader)
        for iteration in range(self.start_iter, self.max_iter):
            start = time.perf_counter()
            batch = self._next(batches, iteration)
            self.resumable = False
            self.iteration = self.history.iteration = iteration
            loaded = time.perf_counter()
            figures, stop = self.step.run(
                batch,
                iteration,
                interrupted=bool(self._interrupt),
                last_checkpoint=lambda: self.last_checkpoint or "",
            )
            self.history.put_all(figures)
            self.history.put("lr", self.step.learning_rate(), smooth=False)
            self.scheduler.step()
            self.history.put("data_time", loaded - start)
            self.history.put("time", time.perf_counter() - start)
            for hook in self.hooks:
                hook.after_step(self)
            if self._is_stopped(stop):
                return

    def _next(self, batches: Iterator[Batch], iteration: int) -> Batch:
        batch = next(batches, None)
        if batch is None:
            raise RuntimeError(
                f"The loader ended before iteration {iteration}; it has to go on for ever."
            )
        if self._resumed_random is not None:
            set_random_state(self._resumed_random)
            self._resumed_random = None
        return batch

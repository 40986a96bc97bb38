"""The training loop: iterations, hooks, interrupts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from cascade_det.data.samples import Batch
from cascade_det.engine.history import History
from cascade_det.engine.hooks import Hook
from cascade_det.engine.loop import TrainingLoop
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
from cascade_det.parallel.interrupts import interrupt_request


class Trainer(TrainingLoop):
    """Trains a detector for a number of iterations.

    Args:
        step: trains on one batch.
        loader: endless batches of this process, from that of ``start_iter`` on.
        scheduler: of the step's optimiser; stepped after every iteration.
        max_iter: iterations of the whole training, including those before ``start_iter``.
        start_iter: how many are done already.
        hooks: called in this order, see :class:`Hook`.

    Attributes:
        detector: the step's.
        optimizer: the step's.
        history: losses (``total_loss`` and each one), ``gradient_norm``, ``lr``, ``time`` and
            ``data_time`` in seconds per iteration, the detector's ``metrics`` and what hooks add.
            Losses and metrics are means over the processes.
    """

    def __init__(
        self,
        step: TrainingStep,
        loader: Iterable[Batch],
        scheduler: LambdaLR,
        *,
        max_iter: int,
        start_iter: int = 0,
        hooks: Sequence[Hook] = (),
    ) -> None:
        self.step = step
        self.detector = step.detector
        self.optimizer = step.optimizer
        self.device = step.device
        self.loader = loader
        self.scheduler = scheduler
        self.max_iter = max_iter
        self.start_iter = start_iter
        self.iteration = start_iter - 1
        self.hooks = list(hooks)
        self._history = History()
        self.results: dict[str, Any] = {}
        self._resumed_random: Mapping[str, Any] | None = None

    @property
    def history(self) -> History:
        """What was measured."""
        return self._history

    def train(self) -> None:
        """Run from ``start_iter`` to ``max_iter``, or until :meth:`stop`.

        Raises:
            FloatingPointError: losses, gradients or boxes are not finite; the weights are as
                before that iteration.
            Interrupted: a signal stopped it; the hooks have saved a checkpoint.
            RuntimeError: the loader ended.
        """
        self.finished = self.resumable = self._stopping = False
        self.history.iteration = max(self.iteration, 0)
        training_mode(self.detector)
        with interrupt_request() as self._interrupt, ExitStack() as ends:
            # Every hook's after_train runs, in order, even if an earlier one fails.
            for hook in reversed(self.hooks):
                ends.callback(hook.after_train, self)
            for hook in self.hooks:
                hook.before_train(self)
            # A hook may have stopped the training before its first step.
            if not self._stopping:
                self._train_to_the_end()
            self.finished = True

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the weights, as plain types.

        Every process has to call it, since it gathers the random state of each.
        """
        hooks = {type(hook).__name__: hook.state_dict() for hook in self.hooks}
        return {
            "optimizer": optimizer_state(self.optimizer, self.step.module),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.step.state_dict(),
            # Before its first step a resumed run has not restored its random state yet.
            "random": distributed.all_gather(self._resumed_random or random_state()),
            "history": self.history.state_dict(),
            "hooks": {name: state for name, state in hooks.items() if state},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; ``start_iter`` comes from the constructor."""
        load_optimizer_state(self.optimizer, self.step.module, state["optimizer"])
        load_scheduler_state(self.scheduler, state["scheduler"])
        self.step.load_state_dict(state["scaler"])
        self.history.load_state_dict(state["history"])
        for hook in self.hooks:
            if type(hook).__name__ in state["hooks"]:
                hook.load_state_dict(state["hooks"][type(hook).__name__])
        # Starting the loader draws from the same generator: restore it after that.
        self._resumed_random = own_random_state(state["random"])

    def _train_to_the_end(self) -> None:
        if self._is_complete():
            return
        batches = iter(self.loader)
        for iteration in range(self.start_iter, self.max_iter):
            start = time.perf_counter()
            batch = self._next(batches, iteration)
            loaded = time.perf_counter()
            self.history.iteration = iteration
            metrics, stop = self._train_on(batch, iteration)
            self.history.put_all(metrics)
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
                f"The loader ended before iteration {iteration}; it has to be endless."
            )
        if self._resumed_random is not None:
            set_random_state(self._resumed_random)
            self._resumed_random = None
        return batch

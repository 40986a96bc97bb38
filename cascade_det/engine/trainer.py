"""The training loop: iterations, mixed precision, hooks."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cascade_det.engine.events import History
from cascade_det.engine.hooks import Hook
from cascade_det.engine.precision import amp_dtype_of, autocast
from cascade_det.engine.solver import GradientClipper

logger = logging.getLogger(__name__)

Batch = list[dict[str, Any]]


class Trainer:
    """Trains a detector for a number of iterations.

    Args:
        detector: called with a batch, returns a dict of scalar losses to be summed. A dict of
            scalars in its attribute ``metrics`` is logged; NaN there means no value.
        loader: batches without end; its first one is that of ``start_iter``.
        optimizer: of the detector's parameters.
        scheduler: stepped after every iteration.
        max_iter: iterations of the whole training, those before ``start_iter`` included.
        start_iter: how many are done already.
        hooks: called in this order, see :class:`Hook`.
        amp_dtype: type of mixed precision, ``None`` for float32. The loss is scaled only for
            float16 on a GPU.
        clip_gradients: see :func:`cascade_det.engine.solver.build_gradient_clipper`.
        device: of the detector.

    Attributes:
        iteration: the iteration that runs, or was completed last; from 0.
        start_iter: the first one of this run.
        max_iter: one more than the last one.
        history: losses (``total_loss`` and each one), ``lr``, ``time`` and ``data_time`` in
            seconds per iteration, the detector's ``metrics`` and what hooks add.
        results: of the last evaluation; empty before it.
        finished: whether training came to a good end, by ``max_iter`` or by :meth:`stop`.
    """

    def __init__(
        self,
        detector: nn.Module,
        loader: Iterable[Batch],
        optimizer: Optimizer,
        scheduler: LRScheduler,
        *,
        max_iter: int,
        start_iter: int = 0,
        hooks: Sequence[Hook] = (),
        amp_dtype: torch.dtype | str | None = None,
        clip_gradients: GradientClipper | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
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
        self._stopping = False
        self._clip_gradients = clip_gradients
        self._amp_dtype = amp_dtype_of(amp_dtype)
        scaled = self._amp_dtype == torch.float16 and self.device.type == "cuda"
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self._random_state: dict[str, Any] | None = None

    def train(self) -> None:
        """Run from ``start_iter`` to ``max_iter``, or until :meth:`stop`.

        Raises:
            FloatingPointError: a loss is not finite; the weights are as before that iteration.
            RuntimeError: the loader ended.
        """
        logger.info("Training from iteration %d to %d", self.start_iter, self.max_iter)
        self.finished = self._stopping = False
        self.history.iteration = max(self.iteration, 0)
        self.detector.train()
        with ExitStack() as ends:
            # Every hook gets its end, in their order, even if an earlier one fails at its own.
            for hook in reversed(self.hooks):
                ends.callback(hook.after_train, self)
            for hook in self.hooks:
                hook.before_train(self)
            self._run()
            self.finished = True

    def stop(self) -> None:
        """End training, as if done, after the hooks of this iteration."""
        self._stopping = True

    def state_dict(self) -> dict[str, Any]:
        """What goes on after a resume beside model, optimiser and schedule, as plain types."""
        hooks = {type(hook).__name__: hook.state_dict() for hook in self.hooks}
        return {
            "scheduler": self.scheduler.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "random": _random_state(),
            "history": self.history.state_dict(),
            "hooks": {name: state for name, state in hooks.items() if state},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`. ``start_iter`` is given to the constructor."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if state["scaler"] and self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])
        self.history.load_state_dict(state["history"])
        for hook in self.hooks:
            if type(hook).__name__ in state["hooks"]:
                hook.load_state_dict(state["hooks"][type(hook).__name__])
        # Starting the loader draws from the same generator: set it when that is over.
        self._random_state = dict(state["random"])

    def _run(self) -> None:
        if self.start_iter >= self.max_iter:
            logger.info("Nothing to train: all %d iterations are done", self.max_iter)
            return
        batches = iter(self.loader)
        for iteration in range(self.start_iter, self.max_iter):
            self.iteration = self.history.iteration = iteration
            self._step(batches)
            for hook in self.hooks:
                hook.after_step(self)
            if self._stopping:
                return

    def _step(self, batches: Iterator[Batch]) -> None:
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            raise RuntimeError(
                f"The loader ended before iteration {self.iteration}; it has to go on for ever."
            )
        data_time = time.perf_counter() - start
        if self._random_state is not None:
            _set_random_state(self._random_state)
            self._random_state = None

        with autocast(self.device, self._amp_dtype):
            losses = self.detector(batch)
            total = sum(losses.values())
        self.optimizer.zero_grad()
        self._scaler.scale(total).backward()
        # One wait for the device: after it has been given all of the work, before weights change.
        metrics = _metrics_of(self.detector)
        figures = _to_floats({"total_loss": total, **losses, **metrics})
        self._check_finite({name: figures[name] for name in ("total_loss", *losses)}, batch)
        self._update_weights()

        # A mean over nothing, such as the accuracy of a stage without objects, is no figure.
        self.history.put_all({k: v for k, v in figures.items() if not math.isnan(v)})
        self.history.put("lr", self._lr(), smooth=False)
        self.scheduler.step()
        self.history.put("data_time", data_time)
        self.history.put("time", time.perf_counter() - start)

    def _update_weights(self) -> None:
        if self._clip_gradients is not None:
            self._scaler.unscale_(self.optimizer)
            groups = self.optimizer.param_groups
            self._clip_gradients([p for group in groups for p in group["params"]])
        self._scaler.step(self.optimizer)
        self._scaler.update()

    def _check_finite(self, figures: Mapping[str, float], batch: Batch) -> None:
        if all(math.isfinite(value) for value in figures.values()):
            return
        losses = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        images = [sample.get("image_id") for sample in batch]
        raise FloatingPointError(
            f"The loss is not finite at iteration {self.iteration}: {losses} (learning rate "
            f"{self._lr():.4g}, image ids {images}). Lower SOLVER.BASE_LR, lengthen "
            "SOLVER.WARMUP_ITERS, clip gradients (SOLVER.CLIP_GRADIENTS.ENABLED True), or compute "
            "in float32 (SOLVER.AMP.ENABLED False)."
        )

    def _lr(self) -> float:
        """The learning rate of the group with the most parameters."""
        return max(self.optimizer.param_groups, key=lambda group: len(group["params"]))["lr"]


def _to_floats(scalars: Mapping[str, Tensor | float]) -> dict[str, float]:
    device = next(value.device for value in scalars.values() if isinstance(value, Tensor))
    tensors = [torch.as_tensor(v, dtype=torch.float32, device=device) for v in scalars.values()]
    values = torch.stack([tensor.detach() for tensor in tensors]).tolist()
    return dict(zip(scalars, values, strict=True))


def _metrics_of(detector: nn.Module) -> dict[str, Tensor | float]:
    # DistributedDataParallel keeps the detector one level below.
    return getattr(getattr(detector, "module", detector), "metrics", None) or {}


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])

"""The training loop: iterations, mixed precision, several processes, hooks."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from cascade_det.engine import distributed
from cascade_det.engine.batches import Batch, split_batch
from cascade_det.engine.divergence import LOSS_SCALE, divergence, save_step
from cascade_det.engine.events import History, mean_figures
from cascade_det.engine.hooks import Hook
from cascade_det.engine.interrupts import Interrupted, InterruptRequest, interrupt_request
from cascade_det.engine.precision import amp_dtype_of, autocast
from cascade_det.engine.solver import GradientClipper
from cascade_det.engine.training_state import (
    load_optimizer_state,
    load_scheduler_state,
    optimizer_state,
    own_random_state,
    random_state,
    set_random_state,
)

logger = logging.getLogger(__name__)

_INTERRUPTED = "interrupted"


class Trainer:
    """Trains a detector for a number of iterations.

    Args:
        detector: called with a batch, returns a dict of scalar losses to be summed. A dict of
            scalars in its attribute ``metrics`` is logged; NaN there means no value. May be
            wrapped by DistributedDataParallel.
        loader: batches without end, of each process its share; the first is that of
            ``start_iter``.
        optimizer: of the detector's parameters.
        scheduler: stepped after every iteration.
        max_iter: iterations of the whole training, those before ``start_iter`` included.
        start_iter: how many are done already.
        hooks: called in this order, see :class:`Hook`.
        amp_dtype: type of mixed precision, ``None`` for float32. The loss is scaled only for
            float16 on a GPU.
        clip_gradients: see :func:`cascade_det.engine.solver.build_gradient_clipper`.
        accumulation_steps: equal parts that a batch is computed in; gradients are the mean.
        device: of the detector.
        output_dir: where the batch of a step that diverged goes; ``None``: nowhere.

    Attributes:
        iteration: the iteration that runs, or was completed last; from 0.
        start_iter: the first one of this run.
        max_iter: one more than the last one.
        history: losses (``total_loss`` and each one), ``gradient_norm``, ``lr``, ``time`` and
            ``data_time`` in seconds per iteration, the detector's ``metrics`` and what hooks add.
            Losses and metrics are means over the processes.
        results: of the last evaluation; empty before it.
        finished: whether training came to a good end, by ``max_iter`` or by :meth:`stop`.
        resumable: whether a checkpoint now, after an end that was not good, would go on with the
            next iteration as if nothing had happened. The hook that saves checkpoints sets it
            after a step; of several processes, only those that are interrupted together are.
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
        self.detector = detector
        self.loader = loader
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.max_iter = max_iter
        self.start_iter = start_iter
        self.iteration = start_iter - 1
        self.hooks = list(hooks)
        self.device = torch.device(device)
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.history = History()
        self.results: dict[str, Any] = {}
        self.finished = False
        self.resumable = False
        self.last_checkpoint: str | None = None
        self._stopping = False
        self._interrupt = InterruptRequest()
        self._clip_gradients = clip_gradients
        self._accumulation_steps = accumulation_steps
        self._amp_dtype = amp_dtype_of(amp_dtype)
        scaled = self._amp_dtype == torch.float16 and self.device.type == "cuda"
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
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
        self.detector.train()
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

    def stop(self) -> None:
        """End training, as if done, after the hooks of this iteration."""
        self._stopping = True

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """For what a hook does for long: within the block a signal ends the training at once.

        Several processes would lose each other, so there the signal waits for the next iteration.

        Raises:
            Interrupted: a signal came, before the block or within.
        """
        if distributed.world_size() > 1:
            yield
            return
        try:
            if self._interrupt:
                raise KeyboardInterrupt
            self._interrupt.immediate = True
            yield
        except KeyboardInterrupt:
            raise Interrupted(
                f"Interrupted in the hooks after iteration {self.iteration}"
            ) from None
        finally:
            self._interrupt.immediate = False

    @property
    def module(self) -> nn.Module:
        """The detector itself, which DistributedDataParallel keeps one level below."""
        return getattr(self.detector, "module", self.detector)

    def state_dict(self) -> dict[str, Any]:
        """What goes on after a resume beside the weights, as plain types.

        Every process has to call it: each one's random numbers are in it.
        """
        hooks = {type(hook).__name__: hook.state_dict() for hook in self.hooks}
        return {
            "optimizer": optimizer_state(self.optimizer, self.module),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self._scaler.state_dict(),
            # Before its first step a resumed run has not taken up its random numbers yet.
            "random": distributed.all_gather(self._resumed_random or random_state()),
            "history": self.history.state_dict(),
            "hooks": {name: state for name, state in hooks.items() if state},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`. ``start_iter`` is given to the constructor."""
        load_optimizer_state(self.optimizer, self.module, state["optimizer"])
        load_scheduler_state(self.scheduler, state["scheduler"])
        if state["scaler"] and self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])
        self.history.load_state_dict(state["history"])
        for hook in self.hooks:
            if type(hook).__name__ in state["hooks"]:
                hook.load_state_dict(state["hooks"][type(hook).__name__])
        # Starting the loader draws from the same generator: set it when that is over.
        self._resumed_random = own_random_state(state["random"])

    def _run(self) -> None:
        if self.start_iter >= self.max_iter:
            logger.info(
                "This training is complete: all %d iterations of SOLVER.MAX_ITER are done. Raise "
                "SOLVER.MAX_ITER to train longer.",
                self.max_iter,
            )
            return
        logger.info("Training from iteration %d to %d", self.start_iter, self.max_iter)
        batches = iter(self.loader)
        for iteration in range(self.start_iter, self.max_iter):
            start = time.perf_counter()
            batch = self._next(batches, iteration)
            self.resumable = False
            self.iteration = self.history.iteration = iteration
            loaded = time.perf_counter()
            stop = self._step(batch, bool(self._interrupt))
            self.history.put("data_time", loaded - start)
            self.history.put("time", time.perf_counter() - start)
            for hook in self.hooks:
                hook.after_step(self)
            if self._stopping:
                return
            if stop and iteration < self.max_iter - 1:
                self.resumable = True
                raise Interrupted(f"Interrupted after iteration {iteration} of {self.max_iter}")

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

    def _step(self, batch: Batch, interrupted: bool) -> bool:
        """One step of the optimiser; whether any process was asked to stop."""
        random = random_state()
        self.optimizer.zero_grad()
        parts: list[dict[str, Tensor | float]] = []
        batches = split_batch(batch, self._accumulation_steps)
        for number, images in enumerate(batches, start=1):
            # Gradients of all processes are averaged once, with the last part.
            last = number == len(batches)
            wait = nullcontext() if last else getattr(self.detector, "no_sync", nullcontext)()
            with wait:
                parts.append(self._backward(images, 1 / len(batches)))
        self._scaler.unscale_(self.optimizer)
        overall: dict[str, Tensor | float] = {"gradient_norm": self._gradient_norm()}
        if self._scaler.is_enabled():
            overall[LOSS_SCALE] = self._scaler.get_scale()
        # One wait for the device: after it has been given all of the work, before weights change.
        overall[_INTERRUPTED] = float(interrupted)
        figures = mean_figures(parts, overall, self.device)
        stop = figures.pop(_INTERRUPTED) > 0
        if problem := divergence(figures):
            self._fail(problem, parts, batch, random)
        if self._clip_gradients is not None:
            self._clip_gradients(self._parameters())
        self._scaler.step(self.optimizer)
        self._scaler.update()

        # A mean over nothing, such as the accuracy of a stage without objects, is no figure.
        self.history.put_all({k: v for k, v in figures.items() if not math.isnan(v)})
        self.history.put("lr", self._lr(), smooth=False)
        self.scheduler.step()
        return stop

    def _backward(self, batch: Batch, share: float) -> dict[str, Tensor | float]:
        """Add ``share`` of the gradients of a batch; its losses and metrics."""
        with autocast(self.device, self._amp_dtype):
            losses = self.detector(batch)
            total = sum(losses.values())
        self._scaler.scale(total * share).backward()
        return {"total_loss": total, **losses, **(getattr(self.module, "metrics", None) or {})}

    def _gradient_norm(self) -> Tensor:
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        # A scaled gradient that overflows is expected: the scaler leaves out such a step itself.
        return torch.where(norm.isfinite(), norm, 0.0) if self._scaler.is_enabled() else norm

    def _fail(
        self,
        problem: str,
        parts: Sequence[Mapping[str, Tensor | float]],
        batch: Batch,
        random: Mapping[str, Any],
    ) -> NoReturn:
        """Write the batch where it diverged, and raise. All processes come here together."""
        with torch.no_grad():
            own = any(divergence({k: float(v) for k, v in part.items()}) for part in parts)
        images = [sample.get("image_id") for sample in batch]
        verdicts = distributed.all_gather((own, images))
        # Where only the mean of the gradients is broken, it may be due to any process.
        guilty = [r for r, (broken, _) in enumerate(verdicts) if broken] or range(len(verdicts))
        message = (
            f"Training diverged at iteration {self.iteration}, {problem}; learning rate "
            f"{self._lr():.4g}, image ids {' | '.join(str(verdicts[r][1]) for r in guilty)}. The "
            f"last good checkpoint is {self.last_checkpoint or 'none'}."
        )
        if self.output_dir is not None:
            name = f"diverged_{self.iteration:07d}_rank{{}}.pth"
            if distributed.rank() in guilty:
                self._save_step(self.output_dir / name.format(distributed.rank()), batch, random)
            files = ", ".join(str(self.output_dir / name.format(r)) for r in guilty)
            message += f" The batch is in {files}: see it with --replay-batch."
        raise FloatingPointError(
            f"{message} Lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, clip gradients "
            "(SOLVER.CLIP_GRADIENTS.ENABLED True), or compute in float32 (SOLVER.AMP.ENABLED "
            "False)."
        )

    def _save_step(self, path: Path, batch: Batch, random: Mapping[str, Any]) -> None:
        try:
            save_step(
                path,
                detector=self.module,
                batch=batch,
                random=random,
                iteration=self.iteration,
                amp_dtype=self._amp_dtype,
                parts=self._accumulation_steps,
            )
        except (OSError, RuntimeError):
            # What matters more is why training ends.
            logger.exception("%s cannot be written", path)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _lr(self) -> float:
        """The learning rate of the group with the most parameters."""
        return max(self.optimizer.param_groups, key=lambda group: len(group["params"]))["lr"]

"""One step of an optimiser, whatever detector it trains and whoever loops over the steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cascade_det.engine.batches import Batch, split_batch
from cascade_det.engine.divergence import LOSS_SCALE, divergence, save_step
from cascade_det.engine.events import mean_metrics
from cascade_det.engine.precision import amp_dtype_of, autocast
from cascade_det.engine.solver import GradientClipper
from cascade_det.engine.training_modes import set_progress
from cascade_det.engine.training_state import random_state
from cascade_det.parallel import distributed

logger = logging.getLogger(__name__)

_INTERRUPTED = "interrupted"


class TrainingStep:
    """Forward, backward and one step: in mixed precision, in parts, on several processes.

    Nothing changes the weights before losses, gradients and boxes are known to be finite.

    Args:
        detector: called with a batch, returns a dict of scalar losses to be summed. May be wrapped
            by DistributedDataParallel.
        optimizer: of the detector's parameters.
        metrics: scalars to watch beside the losses of the last call; NaN means no value. ``None``
            looks at the detector's attribute ``metrics``.
        amp_dtype: type of mixed precision, ``None`` for float32. The loss is scaled only for
            float16 on a GPU.
        clip_gradients: see :func:`cascade_det.engine.solver.build_gradient_clipper`.
        accumulation_steps: equal parts that a batch is computed in; gradients are the mean.
        max_iter: iterations of the whole training, of which regimes that change in its course are
            told the share that is done.
        device: of the detector.
        output_dir: where the batch of a step that diverged goes; ``None``: nowhere.
        as_sample: what of a batch such a file can hold: tensors and plain values.
    """

    def __init__(
        self,
        detector: nn.Module,
        optimizer: Optimizer,
        *,
        metrics: Callable[[], Mapping[str, Tensor]] | None = None,
        amp_dtype: torch.dtype | str | None = None,
        clip_gradients: GradientClipper | None = None,
        accumulation_steps: int = 1,
        max_iter: int | None = None,
        device: torch.device | str = "cpu",
        output_dir: str | Path | None = None,
        as_sample: Callable[[Mapping[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        self.detector = detector
        self.optimizer = optimizer
        self.device = torch.device(device)
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.metrics = metrics or (lambda: getattr(self.module, "metrics", None) or {})
        self._as_sample = as_sample
        self._clip_gradients = clip_gradients
        self._accumulation_steps = accumulation_steps
        self._max_iter = max_iter
        self._amp_dtype = amp_dtype_of(amp_dtype)
        scaled = self._amp_dtype == torch.float16 and self.device.type == "cuda"
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)

    @property
    def module(self) -> nn.Module:
        """The detector itself, which DistributedDataParallel keeps one level below."""
        return getattr(self.detector, "module", self.detector)

    def run(
        self,
        batch: Batch,
        iteration: int,
        *,
        interrupted: bool = False,
        last_checkpoint: Callable[[], str] = lambda: "",
    ) -> tuple[dict[str, float], bool]:
        """Train on a batch.

        Args:
            batch: of this process.
            iteration: number of the step, for messages.
            interrupted: whether this process was asked to stop.
            last_checkpoint: gives the newest one, for messages.

        Returns:
            Figures that are known (``total_loss``, losses, ``gradient_norm`` and metrics, means
            over the processes), and whether any process was asked to stop.

        Raises:
            FloatingPointError: losses, gradients or boxes are not finite; the weights are as
                before.
        """
        random = random_state()
        if self._max_iter is not None:
            set_progress(self.module, iteration / self._max_iter)
        self.optimizer.zero_grad()
        parts: list[dict[str, Tensor | float]] = []
        batches = split_batch(batch, self._accumulation_steps)
        step = (batch, iteration, last_checkpoint, random)
        for number, images in enumerate(batches, start=1):
            # Gradients of all processes are averaged once, with the last part.
            last = number == len(batches)
            wait = nullcontext() if last else getattr(self.detector, "no_sync", nullcontext)()
            try:
                with wait:
                    parts.append(self._backward(images, 1 / len(batches)))
            except FloatingPointError as error:
                # The other processes wait for gradients, not for talk.
                own = {distributed.rank(): _image_ids(batch)}
                self._fail(f"as the detector noticed ({error})", own, *step)
        self._scaler.unscale_(self.optimizer)
        overall: dict[str, Tensor | float] = {"gradient_norm": self._gradient_norm()}
        if self._scaler.is_enabled():
            overall[LOSS_SCALE] = self._scaler.get_scale()
        # One wait for the device: after it has been given all of the work, before weights change.
        overall[_INTERRUPTED] = float(interrupted)
        figures = mean_metrics(parts, overall, self.device)
        stop = figures.pop(_INTERRUPTED) > 0
        if problem := divergence(figures):
            self._fail(problem, _guilty(parts, batch), *step)
        if self._clip_gradients is not None:
            self._clip_gradients(self._parameters())
        self._scaler.step(self.optimizer)
        self._scaler.update()
        # A mean over nothing, such as the accuracy of a stage without objects, is no figure.
        return {name: value for name, value in figures.items() if value == value}, stop

    def learning_rate(self) -> float:
        """That of the group with the most parameters."""
        return max(self.optimizer.param_groups, key=lambda group: len(group["params"]))["lr"]

    def state_dict(self) -> dict[str, Any]:
        """The scale of the loss; empty where it is not scaled."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        if state and self._scaler.is_enabled():
            self._scaler.load_state_dict(dict(state))

    def _backward(self, batch: Batch, share: float) -> dict[str, Tensor | float]:
        """Add ``share`` of the gradients of a batch; its losses and metrics."""
        with autocast(self.device, self._amp_dtype):
            losses = self.detector(batch)
            total = sum(losses.values())
        self._scaler.scale(total * share).backward()
        return {"total_loss": total, **losses, **self.metrics()}

    def _gradient_norm(self) -> Tensor:
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        # A scaled gradient that overflows is expected: the scaler leaves out such a step itself.
        return torch.where(norm.isfinite(), norm, 0.0) if self._scaler.is_enabled() else norm

    def _fail(
        self,
        problem: str,
        guilty: Mapping[int, list[Any]],
        batch: Batch,
        iteration: int,
        last_checkpoint: Callable[[], str],
        random: Mapping[str, Any],
    ) -> NoReturn:
        """Write the batch where it diverged, and raise."""
        message = (
            f"Training diverged at iteration {iteration}, {problem}; learning rate "
            f"{self.learning_rate():.4g}, image ids {' | '.join(map(str, guilty.values()))}. The "
            f"last good checkpoint is {last_checkpoint() or 'none'}."
        )
        if self.output_dir is not None:
            name = f"diverged_{iteration:07d}_rank{{}}.pth"
            if distributed.rank() in guilty:
                path = self.output_dir / name.format(distributed.rank())
                self._save(path, batch, iteration, random)
            files = ", ".join(str(self.output_dir / name.format(r)) for r in guilty)
            message += f" The batch is in {files}: see it with --replay-batch."
        raise FloatingPointError(
            f"{message} Lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, clip gradients "
            "(SOLVER.CLIP_GRADIENTS.ENABLED True), or compute in float32 (SOLVER.AMP.ENABLED "
            "False)."
        )

    def _save(self, path: Path, batch: Batch, iteration: int, random: Mapping[str, Any]) -> None:
        try:
            save_step(
                path,
                detector=self.module,
                batch=[self._as_sample(sample) for sample in batch],
                random=random,
                iteration=iteration,
                amp_dtype=self._amp_dtype,
                parts=self._accumulation_steps,
            )
        except (OSError, RuntimeError):
            # What matters more is why training ends.
            logger.exception("%s cannot be written", path)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def _guilty(parts: Sequence[Mapping[str, Tensor | float]], batch: Batch) -> dict[int, list[Any]]:
    """The processes that broke the figures, with the images of each; all come here together."""
    with torch.no_grad():
        own = any(divergence({k: float(v) for k, v in part.items()}) for part in parts)
    verdicts = dict(enumerate(distributed.all_gather((own, _image_ids(batch)))))
    # Where only the mean of the gradients is broken, it may be due to any process.
    broken = [rank for rank, (is_broken, _) in verdicts.items() if is_broken] or list(verdicts)
    return {rank: verdicts[rank][1] for rank in broken}


def _image_ids(batch: Batch) -> list[Any]:
    return [sample.get("image_id") for sample in batch]

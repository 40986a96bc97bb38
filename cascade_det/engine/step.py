"""One optimiser step, for any detector and any training loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cascade_det.core.structures.on_device import device_constant
from cascade_det.data.samples import Batch
from cascade_det.engine.batches import split_batch
from cascade_det.engine.divergence import LOSS_SCALE, divergence
from cascade_det.engine.precision import autocast
from cascade_det.engine.solver import GradientClipper
from cascade_det.engine.step_file import save_step
from cascade_det.engine.training_modes import set_progress
from cascade_det.engine.training_state import random_state
from cascade_det.parallel import distributed

logger = logging.getLogger(__name__)

_INTERRUPTED = "interrupted"


class TrainingStep:
    """Forward, backward and update: in mixed precision, in parts, on several processes.

    The weights change only after losses, gradients and boxes are known to be finite.

    Args:
        detector: called with a batch, returns a dict of scalar losses to be summed. May be wrapped
            by DistributedDataParallel.
        optimizer: of the detector's parameters.
        metrics: returns scalars of the last call besides the losses; NaN means no value. ``None``
            reads the detector's attribute ``metrics``.
        amp_dtype: type of mixed precision, ``None`` for float32. The loss is scaled only for
            float16 on a GPU.
        clip_gradients: see :func:`cascade_det.engine.solver.build_gradient_clipper`.
        accumulation_steps: equal parts that a batch is computed in; gradients are the mean.
        max_iter: iterations of the whole training, for training schedules that change with its
            progress.
        device: of the detector.
        output_dir: where the batch of a diverged step is saved; ``None`` to not save it.
        as_sample: converts an entry of a batch to tensors and plain values for that file.
    """

    def __init__(
        self,
        detector: nn.Module,
        optimizer: Optimizer,
        *,
        metrics: Callable[[], Mapping[str, Tensor]] | None = None,
        amp_dtype: torch.dtype | None = None,
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
        self._amp_dtype = amp_dtype
        scaled = amp_dtype == torch.float16 and self.device.type == "cuda"
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)

    @property
    def module(self) -> nn.Module:
        """The detector without its DistributedDataParallel wrapper."""
        return getattr(self.detector, "module", self.detector)

    def run(
        self,
        batch: Batch,
        iteration: int,
        *,
        interrupted: bool = False,
        last_checkpoint: str | None = None,
    ) -> tuple[dict[str, float], bool]:
        """Train on a batch.

        Args:
            batch: of this process.
            iteration: number of the step, for messages.
            interrupted: whether this process was asked to stop.
            last_checkpoint: path of the newest one, for messages.

        Returns:
            ``total_loss``, losses, ``gradient_norm`` and metrics, means over the processes,
            without entries that have no value; and whether any process was asked to stop.

        Raises:
            FloatingPointError: losses, gradients or boxes are not finite; the weights are as
                before.
        """
        fail = partial(
            self._fail,
            batch=batch,
            iteration=iteration,
            random=random_state(),
            last_checkpoint=last_checkpoint,
        )
        if self._max_iter is not None:
            set_progress(self.module, iteration / self._max_iter)
        self.optimizer.zero_grad()
        parts: list[dict[str, Tensor | float]] = []
        batches = split_batch(batch, self._accumulation_steps)
        for number, images in enumerate(batches, start=1):
            # The gradients of all processes are averaged once, with the last part.
            last = number == len(batches)
            wait = nullcontext() if last else getattr(self.detector, "no_sync", nullcontext)()
            try:
                with wait:
                    parts.append(self._backward(images, 1 / len(batches)))
            except FloatingPointError as error:
                # The other processes are waiting for gradients: no collective call here.
                fail(f"as the detector noticed ({error})", {distributed.rank(): _image_ids(batch)})
        self._scaler.unscale_(self.optimizer)
        overall: dict[str, Tensor | float] = {"gradient_norm": self._gradient_norm()}
        if self._scaler.is_enabled():
            overall[LOSS_SCALE] = self._scaler.get_scale()
        overall[_INTERRUPTED] = float(interrupted)
        # The only wait for the device: after all its work is queued, before the weights change.
        metrics = mean_metrics(parts, overall, self.device)
        stop = metrics.pop(_INTERRUPTED) > 0
        if problem := divergence(metrics):
            fail(problem, _image_ids_of_broken(parts, batch))
        if self._clip_gradients is not None:
            self._clip_gradients(self._parameters())
        self._scaler.step(self.optimizer)
        self._scaler.update()
        # A mean over nothing, such as the accuracy of a stage without objects, has no value.
        return {name: value for name, value in metrics.items() if value == value}, stop

    def learning_rate(self) -> float:
        """The learning rate of the group with the most parameters."""
        return max(self.optimizer.param_groups, key=lambda group: len(group["params"]))["lr"]

    def state_dict(self) -> dict[str, Any]:
        """The scale of the loss; empty where it is not scaled."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        if state and self._scaler.is_enabled():
            self._scaler.load_state_dict(dict(state))

    def _backward(self, batch: Batch, share: float) -> dict[str, Tensor | float]:
        """Add ``share`` of the gradients of a batch; returns its losses and metrics."""
        with autocast(self.device, self._amp_dtype):
            losses = self.detector(batch)
            total = sum(losses.values())
        self._scaler.scale(total * share).backward()
        return {"total_loss": total, **losses, **self.metrics()}

    def _gradient_norm(self) -> Tensor:
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        # A scaled gradient that overflows is expected: the scaler skips such a step itself.
        return torch.where(norm.isfinite(), norm, 0.0) if self._scaler.is_enabled() else norm

    def _fail(
        self,
        problem: str,
        image_ids: Mapping[int, list[Any]],
        *,
        batch: Batch,
        iteration: int,
        random: Mapping[str, Any],
        last_checkpoint: str | None,
    ) -> NoReturn:
        """Save the batch and raise; ``image_ids`` are those of the ranks that diverged."""
        message = (
            f"Training diverged at iteration {iteration}, {problem}; learning rate "
            f"{self.learning_rate():.4g}, image ids {' | '.join(map(str, image_ids.values()))}. "
            f"The last good checkpoint is {last_checkpoint or 'none'}."
        )
        if self.output_dir is not None:
            name = f"diverged_{iteration:07d}_rank{{}}.pth"
            if distributed.rank() in image_ids:
                path = self.output_dir / name.format(distributed.rank())
                self._save(path, batch, iteration, random)
            files = ", ".join(str(self.output_dir / name.format(rank)) for rank in image_ids)
            message += f" The batch is in {files}: inspect it with --replay-batch."
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
            # The divergence itself matters more.
            logger.exception("%s cannot be written", path)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def mean_metrics(
    parts: Sequence[Mapping[str, Tensor | float]],
    overall: Mapping[str, Tensor | float],
    device: torch.device,
) -> dict[str, float]:
    """Means over the parts of a batch and over the processes, with one transfer from the device.

    A metric that is NaN has no value, and the mean leaves it out. A loss that is NaN anywhere
    makes the mean NaN, and so does an entry of ``overall``.

    Args:
        parts: losses and metrics of each part, scalars, all with the same names.
        overall: scalars of all parts of this process together.
        device: where the scalars are.
    """
    names = [*parts[0], *overall]
    merged = [{**part, **overall} for part in parts]
    rows = [torch.stack([_scalar(row[name], device) for name in names]) for row in merged]
    table = torch.stack(rows)  # [parts, names]
    is_strict = tuple("loss" in name or name in overall for name in names)
    strict = device_constant(is_strict, torch.bool, device)
    known = ~table.isnan() | strict
    sums, counts = torch.where(known, table, 0.0).sum(dim=0), known.sum(dim=0)
    totals = distributed.mean_over_processes(torch.cat([sums, counts.float()]))
    values = (totals[: len(names)] / totals[len(names) :]).tolist()
    return dict(zip(names, values, strict=True))


def _scalar(value: Tensor | float, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float32)
    # Unlike a copy from the host, this does not wait for the device.
    return torch.full((), value, dtype=torch.float32, device=device)


def _image_ids_of_broken(
    parts: Sequence[Mapping[str, Tensor | float]], batch: Batch
) -> dict[int, list[Any]]:
    """By rank, the image ids of the processes that diverged; every process calls this."""
    with torch.no_grad():
        own = any(divergence({k: float(v) for k, v in part.items()}) for part in parts)
    verdicts = dict(enumerate(distributed.all_gather((own, _image_ids(batch)))))
    # If only the mean of the gradients is broken, any process may be the cause.
    broken = [rank for rank, (is_broken, _) in verdicts.items() if is_broken] or list(verdicts)
    return {rank: verdicts[rank][1] for rank in broken}


def _image_ids(batch: Batch) -> list[Any]:
    return [sample.get("image_id") for sample in batch]

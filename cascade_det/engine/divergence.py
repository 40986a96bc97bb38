"""When training diverges: what to say, and a file from which the fatal step can be run again."""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cascade_det.config.key import shown
from cascade_det.engine.batches import Batch
from cascade_det.engine.checkpoint import DOES_NOT_FIT
from cascade_det.engine.precision import autocast
from cascade_det.engine.step_file import read_step
from cascade_det.engine.training_modes import (
    freeze_detector,
    progress_of,
    set_progress,
    training_mode,
)
from cascade_det.engine.training_state import set_random_state
from cascade_det.errors import CheckpointError
from cascade_det.files import atomic_path
from cascade_det.text import listed, printable

logger = logging.getLogger(__name__)

# A metric with such a name counts boxes that are NaN or Inf.
NONFINITE_BOXES = "nonfinite_boxes"
# The factor of the loss in float16, which halves with every step whose gradients overflow.
LOSS_SCALE = "amp/scale"
_SMALLEST_SCALE = 1e-4
_SHOWN = 5


def divergence(figures: Mapping[str, float]) -> str | None:
    """What is wrong with the figures of a step: where it shows first, and all losses.

    Args:
        figures: losses, ``gradient_norm``, and metrics; a metric may be NaN, which means no value,
            unless its name ends in ``NONFINITE_BOXES``.

    Returns:
        ``None`` where all is well.
    """
    losses = {n: v for n, v in figures.items() if "loss" in n or n == "gradient_norm"}
    where = _place_of_divergence(figures, losses)
    values = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    return where and f"{where} (losses: {values})"


def _place_of_divergence(figures: Mapping[str, float], losses: Mapping[str, float]) -> str | None:
    boxes = [n for n, v in figures.items() if n.endswith(NONFINITE_BOXES) and v != 0]
    wrong = [name for name, value in losses.items() if not math.isfinite(value)]
    if boxes or wrong:
        # In the order of the computation: the RPN, then stage by stage; sums come last.
        first = min([*boxes, *wrong], key=_order)
        stage = re.search(r"stage(\d+)", first)
        place = f"stage {stage[1]} of the cascade" if stage else _place_of(first)
        what = "boxes are NaN or Inf" if first in boxes else f"{first} is {losses[first]:.4g}"
        return f"in {place}, {what}"
    if figures.get(LOSS_SCALE, 1.0) < _SMALLEST_SCALE:
        scale = f"{LOSS_SCALE} {figures[LOSS_SCALE]:.4g}"
        return f"in the backward pass, gradients overflow however small the loss is scaled, {scale}"
    return None


def save_step(
    path: Path,
    *,
    detector: nn.Module,
    batch: Sequence[Mapping[str, Any]],
    random: Mapping[str, Any],
    iteration: int,
    amp_dtype: torch.dtype | None,
    parts: int = 1,
) -> None:
    """Write a step to a file, as plain types, so that :func:`replay` can run it again.

    Args:
        path: replaced in one step if it is there.
        detector: its weights are those before the step.
        batch: samples.
        random: of before the step, see :func:`~cascade_det.engine.training_state.random_state`.
        iteration: number of the step.
        amp_dtype: of mixed precision.
        parts: how many the batch was computed in.
    """
    content = {
        "model": detector.state_dict(),
        "batch": [dict(sample) for sample in batch],
        "random": dict(random),
        "iteration": iteration,
        "progress": progress_of(detector),
        "parts": parts,
        "amp_dtype": None if amp_dtype is None else str(amp_dtype).removeprefix("torch."),
    }
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def replay(
    path: str | Path,
    detector: nn.Module,
    *,
    device: torch.device | str,
    check: Callable[[Batch], None] = lambda batch: None,
) -> list[str]:
    """Run a step of :func:`save_step` again, forward and backward, and watch every module.

    Args:
        path: the file.
        detector: of the same configuration; it gets the weights of the file.
        device: of the detector.
        check: raises ``ValueError`` where a batch is none that the detector can train on.

    Returns:
        Lines for people: losses, modules with an output that is not finite in the order of the
        computation, and parameters whose gradient is not finite.

    Raises:
        CheckpointError: the file cannot be read, is of another kind, or of another model.
    """
    step = read_step(Path(path))
    try:
        detector.load_state_dict(step.model)
        set_random_state(step.random)
    except DOES_NOT_FIT as error:
        raise CheckpointError(
            f"{path}: does not belong to this model ({printable(str(error), longest=500)}). Give "
            "the configuration that it was written with."
        ) from error
    set_progress(detector, step.progress)
    freeze_detector(detector)
    training_mode(detector)
    losses: dict[str, float] = defaultdict(float)
    noticed: list[str] = []
    try:
        with _watched(detector) as broken:
            for batch in step.batches:
                check(batch)
                with autocast(torch.device(device), step.amp_dtype):
                    found = detector(batch)
                    total = torch.stack(list(found.values())).sum() / len(step.batches)
                total.backward()
                for name, value in found.items():
                    losses[name] += float(value.detach()) / len(step.batches)
    except FloatingPointError as error:
        noticed = [f"the detector noticed: {error}"]
    # A batch that no training ever had ends in whatever stumbles over it.
    except Exception as error:
        raise CheckpointError(
            f"{path}: its batch cannot be computed by this model ({type(error).__name__}: "
            f"{printable(str(error), longest=500)}). Give the file as a training wrote it, and the "
            "configuration of that training."
        ) from error
    gradients = [
        name
        for name, parameter in detector.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    ids = [sample.get("image_id") for batch in step.batches for sample in batch]
    return [
        f"iteration {step.iteration}, image ids {shown(ids)}",
        *(f"{name} {value:.6g}" for name, value in losses.items()),
        *noticed,
        f"outputs that are not finite: {listed(broken, _SHOWN) or 'none'}",
        f"gradients that are not finite: {listed(gradients, _SHOWN) or 'none'}",
    ]


@contextmanager
def _watched(detector: nn.Module) -> Iterator[list[str]]:
    """Collect the names of modules whose output is not finite, in the order of the computation."""
    broken: list[str] = []
    handles = []
    for name, module in detector.named_modules():
        # A module that holds others breaks because one of them does.
        if any(True for _ in module.children()):
            continue

        def look(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all() and name not in broken:
                broken.append(name)

        handles.append(module.register_forward_hook(look))
    try:
        yield broken
    finally:
        for handle in handles:
            handle.remove()


def _order(name: str) -> tuple[int, int]:
    # They are computed from those of the stages.
    if name in ("loss_prefix", "loss_stage_weights", "total_loss", "gradient_norm"):
        return (2, 0)
    stage = re.search(r"stage(\d+)", name)
    return (1, int(stage[1])) if stage else (0, 0)


def _place_of(name: str) -> str:
    if name == "gradient_norm":
        return "the backward pass"
    return "the RPN" if "rpn" in name else "the detector"

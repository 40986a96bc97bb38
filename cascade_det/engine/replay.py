"""Reruns the step at which a training diverged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cascade_det.config.key import shown
from cascade_det.data.samples import Batch
from cascade_det.engine.checkpoint import DOES_NOT_FIT
from cascade_det.engine.precision import autocast
from cascade_det.engine.step_file import SavedStep, read_step
from cascade_det.engine.training_modes import freeze_detector, set_progress, training_mode
from cascade_det.engine.training_state import set_random_state
from cascade_det.errors import CheckpointError
from cascade_det.text import listed, printable

_SHOWN = 5


def replay(
    path: str | Path,
    detector: nn.Module,
    *,
    device: torch.device | str,
    check: Callable[[Batch], None] = lambda batch: None,
) -> list[str]:
    """Rerun a step of :func:`~cascade_det.engine.step_file.save_step`, forward and backward.

    Args:
        path: the file.
        detector: of the same configuration; it gets the weights of the file.
        device: of the detector.
        check: raises ``ValueError`` if the detector cannot be trained on a batch.

    Returns:
        Lines for the user: losses, modules whose output is not finite in the order of the
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
    with _nonfinite_outputs(detector) as broken:
        try:
            _backward(step, detector, torch.device(device), check, losses)
        except FloatingPointError as error:
            noticed = [f"the detector noticed: {error}"]
        # A batch that no training wrote can fail anywhere.
        except Exception as error:
            raise CheckpointError(
                f"{path}: its batch cannot be computed by this model ({type(error).__name__}: "
                f"{printable(str(error), longest=500)}). Give the file as a training wrote it, "
                "and the configuration of that training."
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


def _backward(
    step: SavedStep,
    detector: nn.Module,
    device: torch.device,
    check: Callable[[Batch], None],
    losses: dict[str, float],
) -> None:
    """Compute gradients, and add the losses to ``losses``."""
    for batch in step.batches:
        check(batch)
        with autocast(device, step.amp_dtype):
            found = detector(batch)
            total = torch.stack(list(found.values())).sum() / len(step.batches)
        total.backward()
        for name, value in found.items():
            losses[name] += float(value.detach()) / len(step.batches)


@contextmanager
def _nonfinite_outputs(detector: nn.Module) -> Iterator[list[str]]:
    """Collect the names of modules whose output is not finite, in the order of the computation."""
    broken: list[str] = []
    handles = []
    for name, module in detector.named_modules():
        # A module with children breaks because one of them does.
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

"""The file of a diverged training step. It may come from a stranger: reading checks all of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cascade_det.config.key import shown
from cascade_det.data.samples import Batch
from cascade_det.engine.batches import split_batch
from cascade_det.engine.precision import AMP_DTYPES
from cascade_det.engine.training_modes import progress_of
from cascade_det.errors import CheckpointError
from cascade_det.files import atomic_path
from cascade_det.weights import load_torch_file, plain_tensor

_ENTRIES = ("model", "batch", "random", "iteration", "amp_dtype", "parts")


@dataclass
class SavedStep:
    """What :func:`save_step` wrote.

    Attributes:
        model: a state dict.
        batches: the parts that the batch was computed in.
        random: the random state before the step.
        iteration: number of the step.
        progress: share of the training before the step, in [0, 1].
        amp_dtype: type of mixed precision.
    """

    model: dict[str, Any]
    batches: list[Batch]
    random: dict[str, Any]
    iteration: int
    progress: float
    amp_dtype: torch.dtype | None


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
    """Write a step, as plain types, for :func:`cascade_det.engine.replay.replay`.

    Args:
        path: replaced atomically.
        detector: with the weights before the step.
        batch: samples.
        random: before the step, see :func:`~cascade_det.engine.training_state.random_state`.
        iteration: number of the step.
        amp_dtype: type of mixed precision.
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


def read_step(path: Path) -> SavedStep:
    """Read a step. Nothing in the file is executed; every tensor in it is dense and has its data.

    Raises:
        CheckpointError: the file cannot be read, or is of another kind.
    """
    if not os.path.isfile(path):  # reading a pipe would block
        raise CheckpointError(f"{path}: there is no such file with a batch to replay.")
    content = load_torch_file(path)
    if not isinstance(content, dict) or not content.keys() >= set(_ENTRIES):
        raise CheckpointError(f"{path}: holds no batch to replay: it needs {', '.join(_ENTRIES)}.")
    for name, value in _tensors("", content):
        plain_tensor(value, name, path)
    try:
        return _checked(content)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: holds no batch to replay: {error}.") from error


def _checked(content: dict[str, Any]) -> SavedStep:
    model, random, batch = (content[name] for name in ("model", "random", "batch"))
    for name, value in (("model", model), ("random", random)):
        if not isinstance(value, dict):
            raise ValueError(f"its {name} is {shown(value)}, not a dict")
    if not isinstance(batch, list) or not batch or not all(isinstance(s, dict) for s in batch):
        raise ValueError(f"its batch is {shown(batch)}, not a list of samples")
    iteration, parts, progress = (content.get(n, 0.0) for n in ("iteration", "parts", "progress"))
    for name, value in (("iteration", iteration), ("parts", parts)):
        if type(value) is not int:
            raise ValueError(f"its {name} is {shown(value)}, not a whole number")
    if type(progress) not in (int, float) or not 0 <= progress <= 1:
        raise ValueError(f"its progress is {shown(progress)}, not a number from 0 to 1")
    dtype = content["amp_dtype"]
    if dtype not in AMP_DTYPES:
        raise ValueError(f"its amp_dtype is {shown(dtype)}, not bfloat16, float16 or None")
    batches = split_batch(batch, parts)
    return SavedStep(model, batches, random, iteration, float(progress), AMP_DTYPES[dtype])


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _tensors(f"{name}.{key}" if name else str(key), one)
    elif isinstance(value, (list, tuple)):
        for number, one in enumerate(value):
            yield from _tensors(f"{name}.{number}", one)

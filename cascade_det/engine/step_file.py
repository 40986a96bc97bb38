"""Reads the file of a training step, which may come from anybody, and checks what is in it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade_det.config.key import shown
from cascade_det.engine.batches import Batch, split_batch
from cascade_det.engine.precision import amp_dtype_of
from cascade_det.errors import CheckpointError
from cascade_det.weights.files import load_torch_file, plain_tensor

_ENTRIES = ("model", "batch", "random", "iteration", "amp_dtype", "parts")


@dataclass
class Step:
    """What :func:`cascade_det.engine.divergence.save_step` wrote.

    Attributes:
        model: a state dict.
        batches: the parts that the batch was computed in.
        random: of before the step.
        iteration: number of the step.
        progress: share of the training that was done.
        amp_dtype: of mixed precision.
    """

    model: dict[str, Any]
    batches: list[Batch]
    random: dict[str, Any]
    iteration: int
    progress: float
    amp_dtype: torch.dtype | None


def read_step(path: Path) -> Step:
    """Read a step. Nothing in the file is executed; every tensor in it is dense and has its data.

    Raises:
        CheckpointError: the file cannot be read, or is of another kind.
    """
    if not os.path.isfile(path):  # a pipe would be waited for
        raise CheckpointError(f"{path}: there is no such file with a batch to replay.")
    content = load_torch_file(path)
    if not isinstance(content, dict) or not content.keys() >= set(_ENTRIES):
        raise CheckpointError(f"{path}: holds no batch to replay: it needs {', '.join(_ENTRIES)}.")
    for name, value in _tensors("", content):
        plain_tensor(value, name, path)
    try:
        return _step(content)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: holds no batch to replay: {error}.") from error


def _step(content: dict[str, Any]) -> Step:
    model, random, batch = (content[name] for name in ("model", "random", "batch"))
    for name, value in (("model", model), ("random", random)):
        if not isinstance(value, dict):
            raise ValueError(f"its {name} is {shown(value)}, not a dict")
    if not isinstance(batch, list) or not batch or not all(isinstance(s, dict) for s in batch):
        raise ValueError(f"its batch is {shown(batch)}, not a list of samples")
    iteration, progress = content["iteration"], content.get("progress", 0.0)
    if type(iteration) is not int:
        raise ValueError(f"its iteration is {shown(iteration)}, not a whole number")
    if type(progress) not in (int, float) or not 0 <= progress <= 1 or math.isnan(progress):
        raise ValueError(f"its progress is {shown(progress)}, not a number from 0 to 1")
    parts = content["parts"]
    if type(parts) is not int:
        raise ValueError(f"its parts are {shown(parts)}, not a whole number")
    dtype = amp_dtype_of(content["amp_dtype"])
    return Step(model, split_batch(batch, parts), random, iteration, float(progress), dtype)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _tensors(f"{name}.{key}" if name else str(key), one)
    elif isinstance(value, (list, tuple)):
        for number, one in enumerate(value):
            yield from _tensors(f"{name}.{number}", one)

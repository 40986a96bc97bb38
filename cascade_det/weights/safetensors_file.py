"""Safetensors files: weights, and in the metadata the classes that they detect."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cascade_det.errors import CheckpointError
from cascade_det.files import atomic_path
from cascade_det.weights.reading import reading

# Beside "format", which other programs read.
_RUN = "cascade_det"
_LONGEST_RUN = 2**22  # characters, enough for the names of 10,000 classes


def read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors of a file; under ``model``, beside the entry ``run``, if we wrote it.

    Raises:
        CheckpointError: the file is damaged, or safetensors is not installed.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise _not_installed(path) from error
    with reading(path, "a safetensors file"), safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        text = (file.metadata() or {}).get(_RUN)
    return weights if text is None else {"model": weights, "run": _run(text)}


def write_safetensors(weights: Mapping[str, Tensor], run: Mapping[str, Any], path: Path) -> None:
    """Write weights, atomically.

    Args:
        weights: by Detectron2's names.
        run: plain values: ``class_names`` and ``category_ids``, as in a checkpoint's ``run``.
        path: the file to write.

    Raises:
        CheckpointError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise _not_installed(path) from error
    # It refuses tensors that share memory or are not contiguous.
    own = {name: value.detach().cpu().clone().contiguous() for name, value in weights.items()}
    content = save(own, metadata={"format": "pt", _RUN: json.dumps(dict(run))})
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def _run(text: str) -> Any:
    """The entry ``run``, unchecked; a text that is not json is returned as it is."""
    try:
        return json.loads(text) if len(text) <= _LONGEST_RUN else text
    except (ValueError, RecursionError):
        return text


def _not_installed(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: .safetensors files need a package: pip install safetensors, the extra "
        "[safetensors] of cascade_det"
    )

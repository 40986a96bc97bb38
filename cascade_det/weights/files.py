"""Reads files of weights into tensors under Detectron2's names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from cascade_det.errors import CheckpointError
from cascade_det.weights.addresses import SUFFIXES, local_path
from cascade_det.weights.names import (
    caffe2_to_detectron2,
    has_caffe2_names,
    has_efficientvit_names,
    has_hat_net_names,
    has_maxvit_names,
    has_pvt_v2_names,
    has_timm_pvt_v2_names,
    has_torchvision_resnet_names,
    timm_pvt_v2_to_official,
    torchvision_resnet_to_detectron2,
)
from cascade_det.weights.reading import reading
from cascade_det.weights.restricted_pickle import read_array_pickle
from cascade_det.weights.safetensors_file import read_safetensors

# Factor of the file size.
_MOST_UNPACKED = 10
# The global that torch.load(weights_only=True) names when it refuses a file.
_REFUSED = re.compile(r"[Uu]nsupported (?:global: GLOBAL|GLOBAL|class) ([\w.]+)")
_TRAINED_ON_RGB = (
    "These were trained on RGB images: INPUT.FORMAT RGB, MODEL.PIXEL_MEAN "
    "[123.675, 116.28, 103.53], MODEL.PIXEL_STD [58.395, 57.12, 57.375]"
)
_TRAINED_ON_HALVES = (
    "These were trained on RGB images from -1 to 1: INPUT.FORMAT RGB, MODEL.PIXEL_MEAN "
    "[127.5, 127.5, 127.5], MODEL.PIXEL_STD [127.5, 127.5, 127.5]"
)


@dataclass(frozen=True)
class WeightsFile:
    """What a file of weights holds.

    Attributes:
        path: the local file.
        weights: Detectron2's name to CPU tensor; names may lack the prefix above their part.
        run: the entry ``run`` of our own files, unchecked; ``None`` in other files.
        matches_by_suffix: the file says, or its origin implies, that prefixes are missing.
        origin: whose names the file used: "Detectron2", "Caffe2", "torchvision", "EfficientViT",
            "HAT-Net", "PVTv2" or "MaxViT".
        hint: what users of such a file need to know; may be empty.
    """

    path: Path
    weights: dict[str, Tensor] = field(repr=False)
    run: Any = None
    matches_by_suffix: bool = False
    origin: str = "Detectron2"
    hint: str = ""


def read_weights_file(path: str | Path) -> WeightsFile:
    """Read a ``.pth``, ``.pt``, ``.pkl`` or ``.safetensors`` file; nothing in it is executed.

    The file holds a state dict, alone or under ``"model"`` or ``"state_dict"``, with the names of
    Detectron2, of Caffe2's Detectron, of torchvision's ResNets, or official ones of a trunk
    with attention.

    Args:
        path: a local file, or an address, see
            :func:`cascade_det.weights.local_path`.

    Raises:
        CheckpointError: the file is missing, truncated, unsafe, cannot be downloaded, or holds no
            weights.
    """
    file = local_path(path)
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise CheckpointError(
            f"{file}: weights are read from {', '.join(SUFFIXES)} files, "
            f"not from {file.suffix or 'a file without extension'}."
        )
    try:
        content = _as_dict(reader(file), file)
        weights = _find_weights(content, file)
    except CheckpointError as error:
        if "://" not in str(path):
            raise
        raise CheckpointError(f"{error} Delete it to download {path} again.") from error
    by_suffix = bool(content.get("matching_heuristics", False))
    return _with_detectron2_names(file, weights, content.get("run"), by_suffix)


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights: of their names, shapes, types and values, 64 digits.

    It identifies weights in whatever file they are: a run's ``model_final.pth`` and its last
    checkpoint have the same one, and so does a file that the other host saved.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_torch_file(path: Path) -> Any:
    """``torch.load`` of tensors and plain values onto the CPU.

    Raises:
        CheckpointError: the file is truncated, of another kind, or holds other objects.
    """
    # torch's own message advises switching the protection off.
    with reading(path, "a PyTorch file", details=False):
        _refuse_bomb(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            if not (refused := _REFUSED.search(str(error))):
                raise
            raise CheckpointError(
                f"{path}: refused, because reading it would call {refused[1]}. A checkpoint holds "
                "tensors and plain values and nothing else. Take it from a source that you trust, "
                "or save its state dict alone there."
            ) from error


def _refuse_bomb(path: Path) -> None:
    """PyTorch writes archives uncompressed, but reads compressed ones too."""
    if not is_zipfile(path):
        return
    with ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    size = path.stat().st_size
    if unpacked > _MOST_UNPACKED * size:
        raise CheckpointError(
            f"{path}: refused, its {size:,} bytes would unpack to {unpacked:,}. Take it from a "
            "source that you trust, or save it with PyTorch, which does not compress."
        )


def _read_pickle(path: Path) -> Any:
    content = _as_dict(read_array_pickle(path), path)
    return content.get("blobs", content)


_READERS: dict[str, Callable[[Path], Any]] = {
    ".pth": load_torch_file,
    ".pt": load_torch_file,
    ".pkl": _read_pickle,
    ".safetensors": read_safetensors,
}


def _as_dict(content: object, path: Path) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, not a dict of weights. Save a state dict."
        )
    return content


def _find_weights(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    state = content
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            state = content[key]
            break
    weights = {
        name: plain_tensor(value, name, path)
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, (Tensor, np.ndarray))
    }
    if not weights:
        names = ", ".join(str(key)[:80] for key in list(state)[:8]) or "nothing"
        raise CheckpointError(
            f"{path}: holds no tensors; found {names}. Weights are expected at the top, under "
            "'model' or under 'state_dict'."
        )
    # Left by DistributedDataParallel.
    consume_prefix_in_state_dict_if_present(weights, "module.")
    return weights


def plain_tensor(value: Tensor | np.ndarray, name: str, path: Path) -> Tensor:
    """``value`` as a dense tensor on the CPU.

    Raises:
        CheckpointError: it is sparse, quantised, on no device, or larger than its file.
    """
    try:
        tensor = torch.as_tensor(value)
    except TypeError as error:
        raise CheckpointError(
            f"{path}: {name[:80]} is not a tensor of numbers ({error})."
        ) from error
    kind = f"{tensor.dtype} {tensor.layout} {tensor.device}".replace("torch.", "")
    if not re.fullmatch(r"(bool|b?float\w+|u?int\w+) strided cpu", kind):
        raise CheckpointError(
            f"{path}: {name[:80]} is a tensor of kind {kind}; weights are dense numbers."
        )
    if tensor.numel() * tensor.element_size() > path.stat().st_size * _MOST_UNPACKED:
        raise CheckpointError(
            f"{path}: {name[:80]} claims to be {tuple(tensor.shape)}, which is more than the file "
            "holds."
        )
    return tensor


def _with_detectron2_names(
    path: Path, weights: dict[str, Tensor], run: Any, by_suffix: bool
) -> WeightsFile:
    if has_caffe2_names(weights):
        return WeightsFile(path, caffe2_to_detectron2(weights), run, True, "Caffe2")
    if has_torchvision_resnet_names(weights):
        hint = f"{_TRAINED_ON_RGB}, MODEL.RESNETS.STRIDE_IN_1X1 False."
        renamed = torchvision_resnet_to_detectron2(weights)
        return WeightsFile(path, renamed, run, True, "torchvision", hint)
    # Our trunks have the official names.
    if has_efficientvit_names(weights):
        return WeightsFile(path, weights, run, True, "EfficientViT", f"{_TRAINED_ON_RGB}.")
    if has_hat_net_names(weights):
        return WeightsFile(path, weights, run, True, "HAT-Net", f"{_TRAINED_ON_RGB}.")
    if has_timm_pvt_v2_names(weights):
        weights = timm_pvt_v2_to_official(weights)
    if has_pvt_v2_names(weights):
        return WeightsFile(path, weights, run, True, "PVTv2", f"{_TRAINED_ON_RGB}.")
    if has_maxvit_names(weights):
        return WeightsFile(path, weights, run, True, "MaxViT", f"{_TRAINED_ON_HALVES}.")
    return WeightsFile(path, weights, run, by_suffix)

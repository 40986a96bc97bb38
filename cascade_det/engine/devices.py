"""Settings that depend on the machine: device, type of mixed precision, backends."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from fvcore.common.config import CfgNode
from torch import nn

from cascade_det.engine.allocator import keep_freed_memory
from cascade_det.engine.precision import AMP_DTYPES
from cascade_det.errors import ConfigError
from cascade_det.report.text import describe_machine

logger = logging.getLogger(__name__)


def resolve_device(cfg: CfgNode) -> torch.device:
    """``MODEL.DEVICE``; the CPU, with a warning, if it is ``cuda`` and there is no GPU.

    Raises:
        ConfigError: there is no GPU of the index that the key names.
    """
    name: str = cfg.MODEL.DEVICE
    kind, _, index = name.partition(":")
    if kind != "cuda":
        return torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index and int(index) >= count:
        gpus = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(count)]
        there = f"the GPUs here are {', '.join(gpus)}" if gpus else "there is no GPU here"
        raise ConfigError(
            f"MODEL.DEVICE is {name}, but {there}. Give {'one of these, ' if gpus else ''}cuda "
            "for any, or cpu."
        )
    if not count:
        logger.warning("MODEL.DEVICE is %s, but no GPU is available: using the CPU.", name)
        return torch.device("cpu")
    return torch.device(name)


def on_its_device(cfg: CfgNode) -> CfgNode:
    """The configuration with its device resolved, for readers of ``MODEL.DEVICE``.

    Raises:
        ConfigError: see ``resolve_device``.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = str(resolve_device(cfg))
    cfg.freeze()
    return cfg


def device_name(device: torch.device | str) -> str:
    """The model name of a GPU or of the CPU."""
    name: str = describe_machine(device)["device_name"]
    return name


def resolve_amp_dtype(name: str | None, device: torch.device) -> torch.dtype | None:
    """The type of mixed precision; ``None`` is float32.

    ``auto`` is bfloat16 on devices with instructions for it, which needs no scaling of the loss;
    else float16 on GPUs, and float32 on CPUs.
    """
    if name != "auto":
        return AMP_DTYPES[name]
    if has_bfloat16(device):
        return torch.bfloat16
    if device.type == "cuda":
        return torch.float16
    logger.warning("SOLVER.AMP: this CPU is not known to compute in bfloat16, training in float32")
    return None


def resolve_fast_dtype(name: str, device: torch.device) -> torch.dtype:
    """``MODEL.CASCADE.FAST.DTYPE``; ``auto`` is the fastest type of the device.

    That is bfloat16 if it has instructions for it, else float16 on GPUs and float32 on CPUs.

    Raises:
        ConfigError: float16 is asked for on a CPU.
    """
    if name == "auto":
        is_gpu = device.type == "cuda"
        name = "bfloat16" if has_bfloat16(device) else "float16" if is_gpu else "float32"
    elif name == "float16" and device.type == "cpu":
        raise ConfigError(
            "MODEL.CASCADE.FAST.DTYPE is 'float16', which is for GPUs. Give 'auto' on a CPU."
        )
    elif name == "bfloat16" and not has_bfloat16(device):
        logger.warning(
            "MODEL.CASCADE.FAST.DTYPE is bfloat16, which this device is not known to have "
            "instructions for: it may be slower than float32, or than float16 on a GPU"
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def describe_dtypes(dtypes: Iterable[tuple[str, torch.dtype]]) -> str:
    """The types of a model's parts: ``bfloat16``, or ``bfloat16: fpn, rpn; float32: stem``.

    Args:
        dtypes: pairs of a part and its type; several of a part that computes in several types.
    """
    parts: dict[str, list[str]] = {}
    for name, dtype in dict.fromkeys(dtypes):
        parts.setdefault(str(dtype).removeprefix("torch."), []).append(name)
    if len(parts) <= 1:
        return next(iter(parts), "float32")
    return "; ".join(f"{dtype}: {', '.join(names)}" for dtype, names in parts.items())


def weight_dtypes(parts: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, torch.dtype]]:
    """The types of the weights of named parts, in which they compute without autocast.

    A part without weights has none. Of ``named_children()``, for example.
    """
    pairs = ((name, p.dtype) for name, part in parts for p in part.parameters())
    return [(name, dtype) for name, dtype in dict.fromkeys(pairs) if dtype.is_floating_point]


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; emulation is slower than float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def set_backends(cfg: CfgNode) -> None:
    """Set process-wide options: cuDNN, the precision of float32, reuse of freed memory.

    For commands, whose process is their own. Heads, detectors and ``optimize`` set none of them
    but the last one, in ``optimize`` on a CPU.
    """
    if cfg.MODEL.DEVICE == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    if cfg.FLOAT32_PRECISION:
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)

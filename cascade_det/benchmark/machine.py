"""A description of the machine that times are measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
import torchvision

from cascade_det.report.text import describe_machine

# CPU features that decide how fast products are, under Linux's names.
_X86 = {"avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"}
_AMX = {"amx_tile", "amx_bf16", "amx_fp16"}
_ARM = {"asimd", "asimdhp", "sve", "bf16", "i8mm"}


def describe(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Processor, instructions, threads, GPU and versions, as plain values.

    Args:
        device: where the models run.
    """
    device = torch.device(device)
    has_affinity = hasattr(os, "sched_getaffinity")
    machine = {
        **describe_machine(device),
        "cpu": describe_machine("cpu")["device_name"],
        "cores": len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "instructions": instructions(),
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }
    del machine["dtype"]
    if device.type == "cuda":
        machine |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "float32_precision": torch.get_float32_matmul_precision(),
        }
    return machine


def instructions(cpuinfo: str | None = None) -> list[str]:
    """The CPU features that matter for products, sorted, under Linux's names.

    Args:
        cpuinfo: text of ``/proc/cpuinfo``; ``None`` reads the file, if it exists.
    """
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        cpuinfo = path.read_text(encoding="utf-8") if path.is_file() else ""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):  # "Features" on ARM
            return sorted((_X86 | _AMX | _ARM).intersection(value.split()))
    return []

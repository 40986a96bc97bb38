"""The machine that times are measured on: what it is, and what it can at most."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch.nn import functional as F

from cascade_det.core.structures import PartTimer
from cascade_det.report.text import describe_machine

# What decides how fast a CPU multiplies, under the names that Linux gives the instructions.
_INSTRUCTIONS = {
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_fp16", "asimd", "asimdhp", "sve", "bf16", "i8mm"),
}
# A product or a convolution grows until it takes this long: by then all units are busy. Where a
# type is emulated, the smallest one is long enough.
_LONG = 0.1
_SECONDS = 0.4
_SIDES = (256, 512, 1024, 2048, 4096, 8192)
_MAP_SIDES = (16, 32, 64, 128, 256, 512)
_CHANNELS = 256
_COPIED_BYTES = 2**27

Work = Callable[[], object]


@dataclass(frozen=True)
class Peaks:
    """The best rates that were measured.

    Attributes:
        bytes_moved: bytes per second that a copy of a large tensor reads and writes.
        products: multiply-adds per second in square matrix products, by type ("float32", ...).
        convolutions: likewise in a 3x3 convolution of 256 channels.
    """

    bytes_moved: float
    products: Mapping[str, float]
    convolutions: Mapping[str, float]

    def multiply_adds(self, dtype: torch.dtype) -> float:
        """Multiply-adds per second in a type, by whatever was fastest.

        Raises:
            KeyError: the type was not measured.
        """
        name = _name(dtype)
        return max(self.products[name], self.convolutions[name])

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers."""
        return asdict(self)


def describe(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Processor, instructions, threads, GPU and versions, as plain values.

    Args:
        device: where the models run.
    """
    device = torch.device(device)
    cpu = describe_machine("cpu")
    machine = {
        **describe_machine(device),
        "cpu": cpu["device_name"],
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
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
    """Those instructions of the CPU that matter for products, sorted.

    Args:
        cpuinfo: the text of ``/proc/cpuinfo``; ``None`` reads that of this machine.

    Returns:
        A subset of the names of Linux; empty where there is no such file.
    """
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        cpuinfo = path.read_text(encoding="utf-8") if path.is_file() else ""
    entries = (line.partition(":") for line in cpuinfo.splitlines())
    # "Features" on ARM; the cores of one machine have the same.
    listed = (value.split() for key, _, value in entries if key.strip() in ("flags", "Features"))
    return sorted(_INSTRUCTIONS.intersection(next(listed, [])))


def measure_peaks(
    device: torch.device | str = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    *,
    best_seconds: Callable[[Work, torch.device], float] | None = None,
) -> Peaks:
    """Run products, convolutions and copies, and take the best of some runs.

    Args:
        device: to measure, with the threads and the precision of float32 that are set.
        dtypes: types of the products.
        best_seconds: the seconds that a piece of work takes on a device; ``None`` for the shortest
            of as many runs as fit in some tenths of a second.
    """
    device = torch.device(device)
    measured = best_seconds or _best_seconds

    def clock(work: Work) -> float:
        return measured(work, device)

    with torch.inference_mode():
        products = {
            _name(dtype): _best_rate((_product(side, device, dtype) for side in _SIDES), clock)
            for dtype in dtypes
        }
        convolutions = {
            _name(dtype): _best_rate(
                (_convolution(side, device, dtype) for side in _MAP_SIDES), clock
            )
            for dtype in dtypes
        }
        source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        moved = 2 * _COPIED_BYTES / clock(lambda: target.copy_(source))
    return Peaks(moved, products, convolutions)


def _best_rate(cases: Iterable[tuple[Work, int]], clock: Callable[[Work], float]) -> float:
    """The highest amount per second of ever larger pieces of work."""
    best = 0.0
    for work, amount in cases:
        seconds = clock(work)
        best = max(best, amount / seconds)
        if seconds > _LONG:
            break
    return best


def _product(side: int, device: torch.device, dtype: torch.dtype) -> tuple[Work, int]:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, side**3


def _convolution(side: int, device: torch.device, dtype: torch.dtype) -> tuple[Work, int]:
    maps, weight = (
        torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
        for shape in ((1, _CHANNELS, side, side), (_CHANNELS, _CHANNELS, 3, 3))
    )
    return lambda: F.conv2d(maps, weight, padding=1), 9 * side**2 * _CHANNELS**2


def _best_seconds(work: Work, device: torch.device) -> float:
    best = total = 0.0
    while total < _SECONDS:
        timer = PartTimer(device)
        with timer.part("work"):
            work()
        seconds = timer.milliseconds["work"] / 1000
        best = min(best or seconds, seconds)
        total += seconds
    return best


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

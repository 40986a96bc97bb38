"""The highest rates that a machine reaches in products, convolutions and copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import functional as F

from cascade_det.core import PartTimer

# Operands grow until one call takes this long: by then all units are busy.
_LONG = 0.1  # seconds
_SECONDS = 0.4  # per operand size
_SIDES = (256, 512, 1024, 2048, 4096, 8192)
_MAP_SIDES = (16, 32, 64, 128, 256, 512)
_CHANNELS = 256
_COPIED_BYTES = 2**27

Call = Callable[[], object]


def measure_peaks(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Measure products, convolutions and copies.

    Args:
        device: to measure, with the current threads and float32 precision.
        dtype: of the operands.

    Returns:
        ``bytes_moved``, the bytes per second that a copy reads and writes; ``products`` (square
        matrices) and ``convolutions`` (3x3, 256 channels), in multiply-adds per second, each by
        dtype name.
    """
    name = str(dtype).removeprefix("torch.")
    with torch.inference_mode():
        product = _best_rate((_product(side, device, dtype) for side in _SIDES), device)
        convolution = _best_rate((_convolution(side, device, dtype) for side in _MAP_SIDES), device)
        source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        moved = 2 * _COPIED_BYTES / _best_seconds(lambda: target.copy_(source), device)
    return {
        "bytes_moved": moved,
        "products": {name: product},
        "convolutions": {name: convolution},
    }


def _best_rate(cases: Iterable[tuple[Call, int]], device: torch.device) -> float:
    """The highest amount per second of ever larger calls."""
    best = 0.0
    for call, amount in cases:
        seconds = _best_seconds(call, device)
        best = max(best, amount / seconds)
        if seconds > _LONG:
            break
    return best


def _product(side: int, device: torch.device, dtype: torch.dtype) -> tuple[Call, int]:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, side**3


def _convolution(side: int, device: torch.device, dtype: torch.dtype) -> tuple[Call, int]:
    maps, weight = (
        torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
        for shape in ((1, _CHANNELS, side, side), (_CHANNELS, _CHANNELS, 3, 3))
    )
    return lambda: F.conv2d(maps, weight, padding=1), 9 * side**2 * _CHANNELS**2


def _best_seconds(call: Call, device: torch.device) -> float:
    best = total = 0.0
    while total < _SECONDS:
        timer = PartTimer(device)
        with timer.part("call"):
            call()
        seconds = timer.milliseconds["call"] / 1000
        best = min(best or seconds, seconds)
        total += seconds
    return best

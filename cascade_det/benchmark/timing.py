"""Run times of models that take turns, and ratios between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """``median`` of the samples, ``low`` and ``high`` (interpolated quartiles), and ``samples``."""
    low, median, high = np.percentile(samples, (25, 50, 75)).tolist()
    return {"median": median, "low": low, "high": high, "samples": list(map(float, samples))}


def ratio(baseline: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """How many times as fast ours is: the ``spread`` of the ratios within each round.

    Args:
        baseline: milliseconds, one per round.
        ours: milliseconds in the same rounds.
    """
    return spread([theirs / own for theirs, own in zip(baseline, ours, strict=True)])


def alternate(
    calls: Mapping[str, Callable[[int], object]],
    *,
    rounds: int,
    warmup: int = 1,
    seconds: float = 0.0,
    device: torch.device | str = "cpu",
    before: Callable[[str, int], None] = lambda name, number: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of each call, each called once per round: A B C A B C.

    A machine that slows down slows all of them, and the samples of one round are close in time.

    Args:
        calls: by name; they get the number of the round, from 0 on, warm-up included.
        rounds: number of measured rounds.
        warmup: number of unmeasured rounds before them.
        seconds: no new round starts after this time, warm-up included, but one is always
            measured; 0 for no limit.
        device: a GPU is synchronised before and after each call.
        before: called before each call with its name and round; not timed.
        clock: returns seconds.
    """
    device = torch.device(device)
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    begin = clock()
    for number in range(warmup + rounds):
        if number > warmup and seconds and clock() - begin > seconds:
            break
        for name, call in calls.items():
            before(name, number)
            _synchronize(device)
            start = clock()
            call(number)
            _synchronize(device)
            if number >= warmup:
                milliseconds[name].append((clock() - start) * 1000)
    return milliseconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

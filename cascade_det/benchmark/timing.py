"""Times of contenders that run in turn, and ratios between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles.

    Attributes:
        median: of the samples.
        low: their first quartile.
        high: their third quartile.
        samples: in the order in which they were taken.
    """

    median: float
    low: float
    high: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """The spread of one sample or more; quartiles between two are interpolated."""
        low, median, high = np.percentile(samples, (25, 50, 75)).tolist()
        return cls(median, low, high, tuple(map(float, samples)))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "samples": list(self.samples)}


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
    """Milliseconds of each call, all of them once in each round: A B C A B C.

    So whatever the machine does meanwhile meets all of them alike, and two samples of one round
    were taken close to each other.

    Args:
        calls: by name; they are given the number of the round, from 0 on, warm-up included.
        rounds: that are measured.
        warmup: rounds before, of which no time is kept.
        seconds: after so long, warm-up included, no further round begins, but one is always
            measured; 0 for no limit.
        device: a GPU is waited for at both ends of a call.
        before: is called before each call, with its name and round, and is not timed.
        clock: gives seconds.
    """
    device = torch.device(device)
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    begin = clock()
    for number in range(warmup + rounds):
        if number > warmup and seconds and clock() - begin > seconds:
            break
        for name, call in calls.items():
            before(name, number)
            synchronize(device)
            start = clock()
            call(number)
            synchronize(device)
            if number >= warmup:
                milliseconds[name].append((clock() - start) * 1000)
    return milliseconds


def ratio(of: Sequence[float], to: Sequence[float]) -> Spread:
    """How many times as long ``of`` takes as ``to``, from the pairs of each round.

    Args:
        of: milliseconds of a peer.
        to: milliseconds of ours, in the same rounds.

    Raises:
        ValueError: they differ in number, or there are none.
    """
    if len(of) != len(to) or not len(of):
        raise ValueError(f"{len(of)} and {len(to)} samples are no pairs")
    return Spread.of([peer / own for peer, own in zip(of, to, strict=True)])


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

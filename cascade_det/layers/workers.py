"""Threads that each compute a piece of work from start to end, and their scratch memory.

With dozens of short operations, waiting for all threads after each would dominate, above all where
other processes share the cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import prod
from threading import Barrier, local

import torch
from torch import Tensor

_OF_THREAD = local()


def run_in_threads(work: Callable[[], None], pieces: int) -> None:
    """Call ``work`` in each of PyTorch's threads, in inference mode, and wait for all.

    Args:
        work: takes pieces until none is left. Operations inside run on one thread.
        pieces: how many there are. A single one runs in the calling thread, on all of PyTorch's.
    """

    def in_inference() -> None:
        with torch.inference_mode():  # which is per thread
            work()

    threads = torch.get_num_threads()
    if threads == 1 or pieces == 1:
        in_inference()
        return
    workers = _workers(threads, os.getpid())
    for done in [workers.submit(in_inference) for _ in range(threads)]:
        done.result()


@cache
def _workers(count: int, process: int) -> ThreadPoolExecutor:
    """Threads in which PyTorch runs operations on one thread.

    ``process`` renews the cache after a fork, which does not copy threads.
    """
    ready = Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # else the first operation resets the number
        torch.set_num_threads(1)
        ready.wait()

    workers = ThreadPoolExecutor(count, "cascade_det", initializer=start)
    try:
        for _ in range(count):
            workers.submit(int)
    except RuntimeError:  # no more threads: release those that wait
        ready.abort()
        raise
    ready.wait()
    torch.set_num_threads(count)  # new threads take the number that was set last
    return workers


def workspace(size: int, dtype: torch.dtype) -> Tensor:
    """Scratch memory of this thread, kept: memory that threads free is seldom reused."""
    kept: Tensor | None = getattr(_OF_THREAD, "workspace", None)
    if kept is None or len(kept) < size or kept.dtype != dtype:
        kept = _OF_THREAD.workspace = torch.empty(size, dtype=dtype)
    return kept[:size]


def carve(memory: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Tensors of these shapes, one after another in ``memory [size]``."""
    sizes = [prod(shape) for shape in shapes]
    parts = memory[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

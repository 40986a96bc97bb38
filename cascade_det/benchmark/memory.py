"""The memory that a model takes at most, in a process of its own.

On CPUs it is the resident set, libraries included: what a process has to be given. On GPUs it is
what torch's allocator handed out.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cascade_det.errors import CascadeDetError

# Each run may allocate what the next one keeps: gradients, momentum, caches.
RUNS = 2

Run = Callable[[], object]


@dataclass(frozen=True)
class Memory:
    """Peaks in bytes.

    Attributes:
        total: the most that was in use, from the first run on.
        above_model: how much that is above what was in use once the model was built.
    """

    total: int
    above_model: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers."""
        return asdict(self)


def peak_memory(
    build: Callable[[], Run],
    *,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    runs: int = RUNS,
) -> Memory:
    """Build and run a model in a new process, which ends afterwards.

    What the first run loads or keeps (gradients, momentum, workspaces) is above the model.

    Args:
        build: picklable; gives what is to be run, such as a call of a model or a training step.
        device: whose memory is meant.
        threads: of the new process; ``None`` for as many as here.
        runs: how often it runs.

    Raises:
        CascadeDetError: the process was ended, as systems do that run out of memory. What ``build``
            or a run raises is raised here.
    """
    threads = threads or torch.get_num_threads()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_measure, build, torch.device(device), threads, runs).result()
        except BrokenProcessPool as error:
            raise CascadeDetError(
                "The process whose memory was measured was ended from outside, probably since "
                "memory ran out: take smaller or fewer images."
            ) from error


def _measure(build: Callable[[], Run], device: torch.device, threads: int, runs: int) -> Memory:
    torch.set_num_threads(threads)
    run = build()
    in_use, peak = (_on_gpu if device.type == "cuda" else _on_cpu)(device)
    before = in_use()
    for _ in range(runs):
        run()
    return Memory(total=peak(), above_model=peak() - before)


Meter = Callable[[], int]


def _on_gpu(device: torch.device) -> tuple[Meter, Meter]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return (
        lambda: torch.cuda.memory_allocated(device),
        lambda: torch.cuda.max_memory_allocated(device),
    )


def _on_cpu(_: torch.device) -> tuple[Meter, Meter]:
    _give_back()
    try:
        # Linux forgets the peak of building: it becomes what is in use now.
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        # Then what counts above the model is what goes beyond the peak of building it.
        return _most_resident, _most_resident
    return lambda: _status("VmRSS"), lambda: _status("VmHWM")


def _give_back() -> None:
    """Let the C library return free memory, which a run would take again unseen."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _most_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status(name: str) -> int:
    """A line of ``/proc/self/status`` in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":"))

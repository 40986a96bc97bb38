"""The peak memory of a model, measured in a process of its own.

On CPUs this is the resident set, libraries included; on GPUs the memory of torch's allocator.
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
from functools import partial
from pathlib import Path

import torch

from cascade_det.errors import CascadeDetError

# The first call may allocate what the second keeps: gradients, momentum, caches.
CALLS = 2

Call = Callable[[], object]
Meter = Callable[[], int]


def peak_memory(
    build: Callable[[], Call],
    *,
    device: torch.device | str = "cpu",
    threads: int = 0,
    calls: int = CALLS,
) -> dict[str, int]:
    """Measure a model in a new process.

    Args:
        build: picklable; builds a model and returns the call to measure.
        device: whose memory to measure.
        threads: of the new process; 0 for as many as here.
        calls: number of calls.

    Returns:
        ``total``, the peak in bytes from the first call on, and ``above_model``, how much more
        that is than before the first call.

    Raises:
        CascadeDetError: the process was killed, as systems do that run out of memory. Errors of
            ``build`` and of the calls are raised here too.
    """
    threads = threads or torch.get_num_threads()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_measure, build, torch.device(device), threads, calls).result()
        except BrokenProcessPool as error:
            raise CascadeDetError(
                "The process that measures memory was killed, probably because memory ran out: "
                "use smaller or fewer images."
            ) from error


def _measure(
    build: Callable[[], Call], device: torch.device, threads: int, calls: int
) -> dict[str, int]:
    torch.set_num_threads(threads)
    call = build()
    in_use, peak = _gpu_meters(device) if device.type == "cuda" else _cpu_meters()
    before = in_use()
    for _ in range(calls):
        call()
    total = peak()
    return {"total": total, "above_model": total - before}


def _gpu_meters(device: torch.device) -> tuple[Meter, Meter]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return (
        partial(torch.cuda.memory_allocated, device),
        partial(torch.cuda.max_memory_allocated, device),
    )


def _cpu_meters() -> tuple[Meter, Meter]:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # else a call could reuse freed memory unnoticed
    try:
        # Linux resets the peak of building to the memory in use now.
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        # Only memory beyond the peak of building counts as above the model.
        return _peak_resident, _peak_resident
    return partial(_status, "VmRSS"), partial(_status, "VmHWM")


def _peak_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status(name: str) -> int:
    """A value of ``/proc/self/status`` in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":"))

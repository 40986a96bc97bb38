"""The peak memory of models, each measured in a process of its own, beside Detectron2's cascade.

On CPUs this is the resident set, libraries included; on GPUs the memory of torch's allocator. The
new process imports this module, so models are imported where they are built.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import multiprocessing
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cascade_det.benchmark.options import Options
from cascade_det.engine.allocator import keep_freed_memory
from cascade_det.errors import CascadeDetError
from cascade_det.report.tables import Metrics, table

logger = logging.getLogger(__name__)

BASELINE = "detectron2-cascade"
_MEGA = 1e6

# The first call may allocate what the second keeps: gradients, momentum, caches.
_CALLS = 2

Call = Callable[[], object]
Meter = Callable[[], int]


def compare_memory(
    options: Options, names: Sequence[str], training: Sequence[str], images: int
) -> dict[str, Any]:
    """Measure the peak memory of inference and of training.

    Args:
        options: batch, number of regions and device are the first ones.
        names: models that run here.
        training: models whose training steps run here, see ``trainable``.
        images: of a training batch.

    Returns:
        ``inference`` and ``training``, each with ``batch`` and ``contenders``: by model ``total``
        and ``above_model`` as ``peak_memory`` and, if Detectron2's cascade runs, ``ratio``, the
        share of its ``above_model``.
    """
    whole = {name: partial(_build_whole, options, name) for name in names}
    steps = {name: partial(_build_step, options, name, images) for name in training}
    return {
        "inference": {
            "batch": options.batches[0],
            "proposals": options.proposals[0],
            "contenders": _peaks(options, whole),
        },
        "training": {"batch": images, "contenders": _peaks(options, steps)},
    }


def memory_sections(results: Metrics) -> list[str]:
    """The results of ``compare_memory`` as tables in Markdown."""
    headers = ["model", "above the model (MB)", "in all (MB)", f"of {BASELINE}"]
    sections: list[str] = []
    for measurement, measured in results.items():
        rows = [
            (name, memory["above_model"] / _MEGA, memory["total"] / _MEGA, memory.get("ratio"))
            for name, memory in measured["contenders"].items()
        ]
        if rows:
            title = f"Peak memory, {measurement}: batch of {measured['batch']}"
            sections.append(table(title, headers, rows, ("", ".0f", ".0f", ".2f")))
    return sections


def peak_memory(
    build: Callable[[], Call], *, device: torch.device | str = "cpu", threads: int = 0
) -> dict[str, int]:
    """Measure a model in a new process.

    Args:
        build: picklable; builds a model and returns the call to measure.
        device: whose memory to measure.
        threads: of the new process; 0 for as many as here.

    Returns:
        ``total``, the peak in bytes from the first call on, and ``above_model``, how much more
        that is than before the first call.

    Raises:
        CascadeDetError: the process was killed, as systems do that run out of memory. Errors of
            ``build`` and of the calls are raised here too.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(
                _measure, build, torch.device(device), threads or torch.get_num_threads()
            ).result()
        except BrokenProcessPool as error:
            raise CascadeDetError(
                "The process that measures memory was killed, probably because memory ran out: "
                "use smaller or fewer images."
            ) from error


def _peaks(options: Options, builds: Mapping[str, Callable[[], Call]]) -> dict[str, dict[str, Any]]:
    peaks: dict[str, dict[str, Any]] = {}
    for name, build in builds.items():
        peaks[name] = {**peak_memory(build, device=options.device, threads=options.threads)}
        logger.info("%s: %.0f MB above the model", name, peaks[name]["above_model"] / _MEGA)
    if BASELINE in peaks:
        for peak in peaks.values():
            peak["ratio"] = peak["above_model"] / peaks[BASELINE]["above_model"]
    return peaks


def _build_whole(options: Options, name: str) -> Call:
    from cascade_det.benchmark.models import open_models
    from cascade_det.benchmark.setup import Setup

    setup = Setup(options)
    model = open_models(setup, [name])[0][name]
    model.adapter.limit_proposals(options.proposals[0])
    inputs = model.adapter.inputs(setup.batches(options.batches[0])[0])
    return lambda: model.run(model.adapter.whole, inputs)


def _build_step(options: Options, name: str, images: int) -> Call:
    from cascade_det.benchmark.comparison import is_ours
    from cascade_det.benchmark.setup import Setup
    from cascade_det.benchmark.training import open_training_steps

    setup = Setup(options)
    if is_ours(name) and setup.device.type == "cpu":
        keep_freed_memory()  # as in training
    return open_training_steps(setup, [name], setup.training_batch(images))[name]


def _measure(build: Callable[[], Call], device: torch.device, threads: int) -> dict[str, int]:
    torch.set_num_threads(threads)
    call = build()
    in_use, peak = _gpu_meters(device) if device.type == "cuda" else _cpu_meters()
    before = in_use()
    for _ in range(_CALLS):
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

"""The peak memory of contenders, beside that of Detectron2's cascade."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from cascade_det.benchmark.comparison import is_ours
from cascade_det.benchmark.contenders import open_contenders
from cascade_det.benchmark.memory import Run, peak_memory
from cascade_det.benchmark.options import Options
from cascade_det.benchmark.setup import Setup
from cascade_det.benchmark.training import open_training_steps
from cascade_det.engine.allocator import keep_freed_memory
from cascade_det.report.tables import Metrics, table

logger = logging.getLogger(__name__)

_PEER = "detectron2-cascade"
_MEGA = 1e6


def compare_memory(
    options: Options, contenders: Sequence[str], training: Sequence[str], images: int
) -> dict[str, Any]:
    """Peaks of contenders, each in a process of its own, in inference and in training.

    Args:
        options: which batch, how many regions, which device.
        contenders: names of those that run.
        training: names of those whose training steps run.
        images: of a training batch.

    Returns:
        ``inference`` and ``training``: ``batch``, and ``contenders`` by name, each as ``Memory``
        and with ``ratio``, its ``above_model`` by that of Detectron2's cascade, where that runs.
    """
    return {
        "inference": {
            "batch": options.batches[0],
            "proposals": options.proposals[0],
            "contenders": _peaks(
                options, {name: partial(_open_whole, options, name) for name in contenders}
            ),
        },
        "training": {
            "batch": images,
            "contenders": _peaks(
                options,
                {name: partial(_open_step, options, name, images) for name in training},
            ),
        },
    }


def memory_sections(results: Metrics) -> list[str]:
    """What ``compare_memory`` gave, as tables in Markdown."""
    headers = ["contender", "above the model (MB)", "in all (MB)", f"of {_PEER}"]
    sections = []
    for measurement, figures in results.items():
        rows = [
            (name, memory["above_model"] / _MEGA, memory["total"] / _MEGA, memory.get("ratio"))
            for name, memory in figures["contenders"].items()
        ]
        if rows:
            title = f"Peak memory, {measurement}: batch of {figures['batch']}"
            sections.append(table(title, headers, rows, ("", ".0f", ".0f", ".2f")))
    return sections


def _peaks(options: Options, builds: dict[str, Callable[[], Run]]) -> dict[str, dict[str, Any]]:
    peaks = {}
    for name, build in builds.items():
        peaks[name] = peak_memory(build, device=options.device, threads=options.threads or None)
        logger.info("%s: %.0f MB above the model", name, peaks[name].above_model / _MEGA)
    found = {name: memory.to_dict() for name, memory in peaks.items()}
    if _PEER in found:
        peer = found[_PEER]["above_model"]
        found = {name: {**row, "ratio": row["above_model"] / peer} for name, row in found.items()}
    return found


def _open_whole(options: Options, name: str) -> Run:
    setup = Setup(options)
    contender = open_contenders(setup, [name])[0][name]
    contender.limit_proposals(options.proposals[0])
    inputs = contender.inputs(setup.batches(options.batches[0])[0])
    return lambda: contender.whole(inputs)


def _open_step(options: Options, name: str, images: int) -> Run:
    setup = Setup(options)
    if is_ours(name) and setup.device.type == "cpu":
        keep_freed_memory()  # as training does
    return open_training_steps(setup, [name], setup.training_batch(images))[name]

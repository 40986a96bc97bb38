"""The peak memory of models, beside that of Detectron2's cascade."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from cascade_det.benchmark.comparison import is_ours
from cascade_det.benchmark.memory import Call, peak_memory
from cascade_det.benchmark.models import open_models
from cascade_det.benchmark.options import Options
from cascade_det.benchmark.setup import Setup
from cascade_det.benchmark.training import open_training_steps
from cascade_det.engine.allocator import keep_freed_memory
from cascade_det.report.tables import Metrics, table

logger = logging.getLogger(__name__)

BASELINE = "detectron2-cascade"
_MEGA = 1e6


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
    whole: dict[str, Callable[[], Call]] = {
        name: partial(_build_whole, options, name) for name in names
    }
    steps: dict[str, Callable[[], Call]] = {
        name: partial(_build_step, options, name, images) for name in training
    }
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
    sections = []
    for measurement, measured in results.items():
        rows = [
            (name, memory["above_model"] / _MEGA, memory["total"] / _MEGA, memory.get("ratio"))
            for name, memory in measured["contenders"].items()
        ]
        if rows:
            title = f"Peak memory, {measurement}: batch of {measured['batch']}"
            sections.append(table(title, headers, rows, ("", ".0f", ".0f", ".2f")))
    return sections


def _peaks(options: Options, builds: dict[str, Callable[[], Call]]) -> dict[str, dict[str, Any]]:
    peaks: dict[str, dict[str, Any]] = {}
    for name, build in builds.items():
        peaks[name] = {**peak_memory(build, device=options.device, threads=options.threads)}
        logger.info("%s: %.0f MB above the model", name, peaks[name]["above_model"] / _MEGA)
    if BASELINE in peaks:
        for peak in peaks.values():
            peak["ratio"] = peak["above_model"] / peaks[BASELINE]["above_model"]
    return peaks


def _build_whole(options: Options, name: str) -> Call:
    setup = Setup(options)
    model = open_models(setup, [name])[0][name]
    model.adapter.limit_proposals(options.proposals[0])
    inputs = model.adapter.inputs(setup.batches(options.batches[0])[0])
    return lambda: model.whole(inputs)


def _build_step(options: Options, name: str, images: int) -> Call:
    setup = Setup(options)
    if is_ours(name) and setup.device.type == "cpu":
        keep_freed_memory()  # as in training
    return open_training_steps(setup, [name], setup.training_batch(images))[name]

"""How often a GPU makes the CPU wait, and how many operations it is sent, by part.

Counted on a pretended GPU, so on every machine alike: no GPU is needed, and none is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from cascade_det import config
from cascade_det.benchmark.models import BenchmarkModel, open_models
from cascade_det.benchmark.options import MODELS, Options
from cascade_det.benchmark.part_timers import time_parts
from cascade_det.benchmark.pretended_gpu import CUDA, PartCounter, PretendedGPU
from cascade_det.benchmark.setup import Model, Setup
from cascade_det.benchmark.training import Step, open_training_steps, trainable
from cascade_det.core import CascadeHead, ExitPolicy
from cascade_det.report.tables import Metrics, part_order, table
from cascade_det.standalone import build_detector

# Autocast is not pretended, and torchvision's model has no parts that could be told apart.
CONTENDERS = tuple(name for name in MODELS if not name.endswith(("-autocast", "torchvision")))
_MIXED = "ours-amp"
_DEFAULT_EXITS = "{}, default exits"
_TRAINING_PARTS = ("preprocess", "backbone", "rpn", "heads", "backward", "metrics", "optimizer")


class _OnPretendedGPU(Setup):
    """Models with drawn weights, which are built on the CPU and moved to a pretended GPU."""

    def __init__(self, options: Options, gpu: PretendedGPU) -> None:
        drawn = (*options.opts, "MODEL.WEIGHTS", "")
        super().__init__(replace(options, device="cpu", opts=drawn))
        self.device = CUDA
        self._gpu = gpu

    def place(self, model: Model) -> Model:
        """The model on the pretended GPU."""
        heads: Any = model.roi_heads
        cascade = getattr(heads, "cascade", heads)
        if isinstance(cascade, CascadeHead):
            cascade.pooler.kernel = "torchvision"  # no other kernel of GPUs runs here
        return self._gpu.move(model)


def measure_waits(options: Options, left_out: dict[str, str]) -> dict[str, Any]:
    """Count waits and operations of inference and of a training step, on drawn weights.

    Sizes that are sent to the GPU once are sent before.

    Args:
        options: configuration, image size, proposals, batches and contenders count.
        left_out: gets the reasons why models cannot run here, by name.

    Returns:
        ``inference``: per batch size ``batch`` and, by model, ``parts``; ``training``: the same
        of one image. Parts are dicts by name with ``waits`` but those of NMS, ``nms`` (its waits)
        and ``operations``.
    """
    gpu = PretendedGPU()
    setup = _OnPretendedGPU(options, gpu)
    assert setup.weights  # drawn on the CPU
    chosen = [name for name in CONTENDERS if name in options.contenders]
    with gpu:
        models, missing = open_models(setup, chosen)
        exits = _default_exits(setup)
        rows: dict[str, BenchmarkModel] = {}
        for name, model in models.items():
            rows[name] = model
            if name.startswith(("ours", "plugin")) and not name.endswith("-exits"):
                rows[_DEFAULT_EXITS.format(name)] = replace(model, exits=exits)
        inference = []
        for images in options.batches:
            counted = {name: _inference(gpu, setup, row, images) for name, row in rows.items()}
            inference.append({"batch": images, "contenders": counted})
        names, not_trained = trainable(setup)
        left_out |= missing | not_trained
        names = [name for name in names if name != _MIXED]
        steps = open_training_steps(setup, names, setup.training_batch(1))
        training = {name: _second(gpu, partial(_take, step, gpu)) for name, step in steps.items()}
    return {"inference": inference, "training": {"batch": 1, "contenders": training}}


def waits_section(measured: Metrics) -> str:
    """Tables of ``measure_waits``."""
    sections = [
        _table(f"a batch of {counted['batch']}", counted["contenders"], part_order)
        for counted in measured["inference"]
        if counted["contenders"]
    ]
    if measured["training"]["contenders"]:
        sections.append(
            _table("a training step of 1 image", measured["training"]["contenders"], _step_order)
        )
    note = (
        "Counted without a GPU. A cell: how often the CPU waits for the GPU, and operations sent "
        "to it, without views and allocations. Waits of NMS, torchvision's kernel, are apart."
    )
    return "\n\n".join([*sections, note])


def _default_exits(setup: Setup) -> ExitPolicy | None:
    """The exits of the configuration."""
    cfg = config.changed(
        setup.cfg,
        "MODEL.CASCADE.EXIT.ENABLED",
        True,
        "MODEL.ROI_HEADS.NAME",
        "EarlyExitCascadeROIHeads",
    )
    return setup.place(build_detector(cfg).eval()).roi_heads.exits


def _inference(
    gpu: PretendedGPU, setup: Setup, model: BenchmarkModel, images: int
) -> dict[str, dict[str, int]]:
    [batch] = setup.batches(images)
    model.adapter.limit_proposals(max(setup.options.proposals))
    timer = PartCounter(gpu)
    return _second(gpu, lambda: model.run(model.adapter.parts, batch, timer))


def _take(step: Step, gpu: PretendedGPU) -> None:
    with time_parts(PartCounter(gpu), step.parts):
        step()


def _second(gpu: PretendedGPU, call: Callable[[], object]) -> dict[str, dict[str, int]]:
    """Counts of the second call, by part."""
    call()
    gpu.reset()
    call()
    return {
        name: {"waits": part["waits"], "nms": part["nms"], "operations": part["launches"]}
        for name, part in gpu.parts.items()
    }


def _table(what: str, models: Metrics, order: Callable[[str], Any]) -> str:
    parts = sorted({part for counted in models.values() for part in counted}, key=order)
    rows = []
    for name, counted in models.items():
        sums = {key: sum(part[key] for part in counted.values()) for key in _KEYS}
        cells = [_cell(counted[part]) if part in counted else "" for part in parts]
        rows.append([name, *cells, _cell(sums), sums["nms"]])
    headers = ["model", *parts, "all", "waits of NMS"]
    return table(f"Waits and operations on a GPU, {what}", headers, rows, "")


_KEYS = ("waits", "nms", "operations")


def _cell(counted: Metrics) -> str:
    return f"{counted['waits']} / {counted['operations']}"


def _step_order(part: str) -> int:
    return _TRAINING_PARTS.index(part) if part in _TRAINING_PARTS else len(_TRAINING_PARTS)

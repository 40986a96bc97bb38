"""One training step of ours and of Detectron2: forward, backward and the optimizer's step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from cascade_det import config
from cascade_det.benchmark.models import why_no_detectron2
from cascade_det.benchmark.part_timers import PartStart
from cascade_det.benchmark.setup import Setup
from cascade_det.data.samples import Sample
from cascade_det.engine import step as engine_step
from cascade_det.engine.devices import has_bfloat16, resolve_amp_dtype
from cascade_det.engine.solver import build_gradient_clipper, build_optimizer
from cascade_det.engine.step import TrainingStep
from cascade_det.standalone import build_detector

_BASELINE = "detectron2-cascade"
# Small enough for random weights to stay finite.
_LEARNING_RATE = ("SOLVER.BASE_LR", 1e-6)


@dataclass
class Step:
    """A model with its optimizer and its batch.

    Attributes:
        run: takes a step.
        parts: the calls that start the parts of a step, see ``time_parts``.
    """

    run: Callable[[], object]
    parts: list[PartStart]

    def __call__(self) -> None:
        """Take a step."""
        self.run()


def trainable(setup: Setup) -> tuple[list[str], dict[str, str]]:
    """The models whose training steps run here, and why the others cannot, both by name.

    "ours" is the step of ``cascade-det train`` in float32, "ours-amp" the same in mixed precision
    with the dtype that suits the device, "detectron2-cascade" the step of Detectron2's trainer.
    """
    names: list[str] = []
    left_out: dict[str, str] = {}
    if setup.cfg.MODEL.MASK_ON:
        return [], {"training": "the drawn objects have no masks: set MODEL.MASK_ON to False"}
    if "ours" in setup.options.contenders:
        names.append("ours")
        if setup.device.type == "cpu" and not has_bfloat16(setup.device):
            left_out["ours-amp"] = "this CPU has no instructions for bfloat16"
        else:
            names.append("ours-amp")
    if _BASELINE in setup.options.contenders:
        if reason := why_no_detectron2():
            left_out[_BASELINE] = reason
        else:
            names.append(_BASELINE)
    return names, left_out


def open_training_steps(
    setup: Setup, names: Sequence[str], batch: Sequence[Sample]
) -> dict[str, Step]:
    """What takes one step on a batch, by name, each with its own model and optimizer.

    Args:
        setup: what all models share.
        names: some of those that ``trainable`` returns.
        batch: see ``Setup.training_batch``.
    """
    return {name: _open_step(setup, name, batch) for name in names}


def _open_step(setup: Setup, name: str, batch: Sequence[Sample]) -> Step:
    if name == _BASELINE:
        from cascade_det.benchmark.detectron2_peer import open_training_step

        return Step(*open_training_step(setup, batch, _LEARNING_RATE))
    cfg = config.changed(setup.cfg, *_LEARNING_RATE)
    detector = build_detector(cfg).train()
    detector.load_state_dict(setup.weights)
    setup.place(detector)
    arguments = config.optimizer_arguments(cfg)
    clip = build_gradient_clipper(arguments.pop("clip"))
    optimizer = build_optimizer(detector, **arguments)
    step = TrainingStep(
        detector,
        optimizer,
        amp_dtype=resolve_amp_dtype("auto", setup.device) if name == "ours-amp" else None,
        clip_gradients=clip,
        device=setup.device,
    )
    numbers = itertools.count()
    parts: list[PartStart] = [
        (detector, "preprocess", "preprocess"),
        (detector.backbone, "forward", "backbone"),
        (detector.proposal_generator, "losses", "rpn"),
        (detector.roi_heads, "losses", "heads"),
        (Tensor, "backward", "backward"),
        (engine_step, "mean_metrics", "metrics"),
        (optimizer, "step", "optimizer"),
    ]
    return Step(lambda: step.run(list(batch), next(numbers)), parts)

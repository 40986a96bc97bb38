"""One step of training of ours and of Detectron2: forward, backward and the optimizer's step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from cascade_det import config
from cascade_det.benchmark.contenders import why_no_detectron2
from cascade_det.benchmark.setup import Sample, Setup
from cascade_det.engine.devices import has_bfloat16, resolve_amp_dtype
from cascade_det.engine.solver import build_gradient_clipper, build_optimizer
from cascade_det.engine.step import TrainingStep
from cascade_det.standalone import build_detector

_PEER = "detectron2-cascade"
# Weights that nobody trained must survive the steps.
_RATE = ("SOLVER.BASE_LR", 1e-6)

Step = Callable[[], object]


def trainable(setup: Setup) -> tuple[list[str], dict[str, str]]:
    """Whose steps can be compared here, and why the others cannot, both by name.

    "ours" is the step of ``tools/train_net.py`` in float32, "ours-amp" the same in mixed precision
    of the type that suits the device, "detectron2-cascade" the step of Detectron2's trainer.
    """
    names: list[str] = []
    left_out: dict[str, str] = {}
    if "ours" in setup.options.contenders:
        names.append("ours")
        if setup.device.type == "cpu" and not has_bfloat16(setup.device):
            left_out["ours-amp"] = "this CPU has no instructions for bfloat16"
        else:
            names.append("ours-amp")
    if _PEER in setup.options.contenders:
        if reason := why_no_detectron2():
            left_out[_PEER] = reason
        else:
            names.append(_PEER)
    return names, left_out


def open_training_steps(
    setup: Setup, names: Sequence[str], batch: Sequence[Sample]
) -> dict[str, Step]:
    """What takes one step on a batch, by name: each with a model and an optimizer of its own.

    Args:
        setup: what the contenders share.
        names: out of those that ``trainable`` gives.
        batch: see ``Setup.training_batch``.
    """
    return {name: _open_step(setup, name, batch) for name in names}


def _open_step(setup: Setup, name: str, batch: Sequence[Sample]) -> Step:
    if name == _PEER:
        from cascade_det.benchmark.detectron2_peer import open_training_step

        return open_training_step(setup, batch, _RATE)
    dtype = resolve_amp_dtype("auto", setup.device) if name == "ours-amp" else None
    return _open_our_step(setup, batch, dtype)


def _open_our_step(setup: Setup, batch: Sequence[Sample], amp_dtype: str | None) -> Step:
    cfg = setup.cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(list(_RATE))
    detector = build_detector(cfg).train()
    detector.load_state_dict(setup.weights)
    arguments = config.optimizer_arguments(cfg)
    clip = build_gradient_clipper(arguments.pop("clip"))
    step = TrainingStep(
        detector,
        build_optimizer(detector, **arguments),
        amp_dtype=amp_dtype,
        clip_gradients=clip,
        device=setup.device,
    )
    numbers = itertools.count()
    return lambda: step.run(list(batch), next(numbers))

"""``MODEL.CASCADE.FAST``: a detector made faster for inference, at the price of rounding.

It holds for evaluation with ``--eval-only``, for prediction and for calibration. Training runs the
model as it is; so do the evaluations during it, but for the heads in Detectron2, which infer on
copies that are made anew after every training step. They are all of that model that is ours to
make faster: ``COMPILE`` and the other parts are nothing to it. ``SOLVER.AMP`` is of training alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fvcore.common.config import CfgNode

from cascade_det.config.rules import Rule, each, only

_NODE = "MODEL.CASCADE.FAST"
PARTS = ("stem", "backbone", "fpn", "rpn", "roi_heads")

FAST_DEFAULTS: dict[str, Any] = {
    "ENABLED": False,
    # "float32", "bfloat16", "float16" (GPUs alone), or "auto" = bfloat16 on devices that have
    # instructions for it, float16 on other GPUs, float32 on other CPUs.
    "DTYPE": "auto",
    # Of "stem", "backbone" (without its stem), "fpn", "rpn" and "roi_heads", those that stay
    # float32. Boxes, scores, and the last layers of RPN and heads always do.
    "FLOAT32_PARTS": (),
    # torch.compile of backbone and FPN, with CUDA graphs on GPUs: a minute or so at the first
    # image. Not for float32 on CPUs, which gains nothing from it.
    "COMPILE": False,
}

FAST_RULES: tuple[Rule, ...] = (
    only(f"{_NODE}.DTYPE", "auto", "float32", "bfloat16", "float16"),
    Rule(
        f"{_NODE}.FLOAT32_PARTS",
        each(lambda part: part in PARTS),
        f"Give a list out of {', '.join(map(repr, PARTS))}.",
    ),
)
FAST_KEYS = tuple(rule.key for rule in FAST_RULES)


def check_fast(cfg: CfgNode) -> Iterator[str]:
    """A type that the device does not compute in."""
    fast = cfg.MODEL.CASCADE.FAST
    if fast.ENABLED and fast.DTYPE == "float16" and cfg.MODEL.DEVICE == "cpu":
        yield (
            f"{_NODE}.DTYPE is 'float16', but MODEL.DEVICE is cpu. Give 'auto', or 'bfloat16' on a "
            "CPU that has instructions for it."
        )


def fast_arguments(cfg: CfgNode) -> dict[str, Any] | None:
    """Arguments of ``cascade_det.standalone.optimize``; ``None`` where FAST is off."""
    fast = cfg.MODEL.CASCADE.FAST
    if not fast.ENABLED:
        return None
    return {
        "dtype": fast.DTYPE,
        "float32_parts": tuple(fast.FLOAT32_PARTS),
        "compile": fast.COMPILE,
    }


def fast_heads_dtype(cfg: CfgNode) -> str | None:
    """The name of the type that fast box heads compute in, alone; ``None`` where FAST is off."""
    fast = cfg.MODEL.CASCADE.FAST
    if not fast.ENABLED:
        return None
    return "float32" if "roi_heads" in fast.FLOAT32_PARTS else fast.DTYPE

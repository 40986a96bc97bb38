"""``MODEL.CASCADE.EXIT``: regions that leave before the last stage, in inference only.

A tuple "per stage" has one value for each stage but the last, from which everything leaves; a
tuple "per gate" one for the gate before stage 0 and one for each stage but the last. A single
value holds for all of them (before stage 0 too).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fvcore.common.config import CfgNode

from cascade_det.config.rules import (
    Rule,
    above,
    at_least,
    each,
    is_number,
    only,
    value_of,
    whole,
    within,
)

NODE = "MODEL.CASCADE.EXIT"

EXIT_DEFAULTS: dict[str, Any] = {
    "ENABLED": False,
    # -- Background is dropped. Probabilities are those of the ensemble up to the stage.
    # Per stage: when no class reaches this; in [0, 1], 0 = never.
    "PRUNE_THRESHOLDS": (0.02,),
    # Before stage 0: when the objectness does not; in [0, 1], 0 = never.
    "PROPOSAL_THRESHOLD": 0.0,
    # Per gate: when the score is below that of the image's PRUNE_BEST-th best by more than this;
    # in [0, 1], 1 = never.
    "PRUNE_MARGINS": (1.0,),
    "PRUNE_BEST": 100,  # >= 1
    # Per gate: when the learned pruner gives it less than this chance; in [0, 1], 0 = never.
    "PRUNER_THRESHOLDS": (0.0,),
    # -- Redundant regions are dropped: those that a better one of their class overlaps by this
    # IoU or more; > 0, above 1 = never.
    "REDUNDANCY_IOU": 0.9,
    # -- Confident regions are final, with the box that they have.
    # Per stage: from this value of CONFIDENCE on; > 0, above 1 = never.
    "THRESHOLDS": (1.01,),
    # "max_prob" (of the best class), "entropy" (1 less the normalised entropy), "margin" (lead of
    # the best class), "agreement" (how many stages before had the same class; THRESHOLDS are
    # numbers of stages) or "learned" (the gate).
    "CONFIDENCE": "max_prob",
    # What their boxes have to reach too: "none", "refinement" (IoU with the box before the stage)
    # or "predicted_iou" (with the object, as the IoU head sees it); per stage, in [0, 1].
    "LOCALISATION": "none",
    "LOCALISATION_THRESHOLDS": (0.9,),
    # -- Budgets: what is left when they are used up is final as it is.
    # The most regions of an image that enter stage 0, 1, ..., the best first; 0 = any number.
    "REGION_BUDGET": (0,),
    "TIME_BUDGET_MS": 0.0,  # milliseconds from the image to its detections; 0 = any time
    "TIME_BUDGET_PER": "image",  # or "batch"
    # Parts that are trained, of which the rules above make use: "iou_head", "gate", "pruner".
    "LEARNED": (),
    # Scores that regions report which left after a stage: sigmoid(scale * logit(p) + shift), for
    # every stage, the last one too; 1 and 0 = as they are.
    "SCORE_SCALES": (1.0,),  # > 0
    "SCORE_SHIFTS": (0.0,),
    # -- What was seen in calibration, by tools/calibrate_exits.py.
    # Mean share of the full cascade's detections of an image that are not reproduced, and how
    # sure that is; -1 = not calibrated.
    "EXPECTED_LOSS": -1.0,
    "EXPECTED_LOSS_DEVIATION": 0.0,
    "DEVICE_NAME": "",  # on which latency was measured, where thresholds depend on it
    # Of the weights that the exits were calibrated on, see cascade_det.weights.digest;
    # others are a warning. "" = any.
    "WEIGHTS_SHA256": "",
}

_OFF: dict[str, Any] = {"ENABLED": True, "PRUNE_THRESHOLDS": (0.0,), "REDUNDANCY_IOU": 1.01}

_PER_STAGE = ("PRUNE_THRESHOLDS", "THRESHOLDS", "LOCALISATION_THRESHOLDS")
_PER_GATE = ("PRUNE_MARGINS", "PRUNER_THRESHOLDS", "REGION_BUDGET", "SCORE_SCALES", "SCORE_SHIFTS")
_SHARES = "Give a list of numbers from 0 to 1"

_CONDITIONS = (
    ("PRUNE_THRESHOLDS", each(within(0, 1)), f"{_SHARES}; 0 means never."),
    ("PROPOSAL_THRESHOLD", within(0, 1), "Give a number from 0 to 1; 0 means never."),
    ("PRUNE_MARGINS", each(within(0, 1)), f"{_SHARES}; 1 means never."),
    ("PRUNE_BEST", whole(at_least(1)), "Give a whole number, 1 or more."),
    ("PRUNER_THRESHOLDS", each(within(0, 1)), f"{_SHARES}; 0 means never."),
    ("REDUNDANCY_IOU", above(0), "Give a number above 0; above 1 means never."),
    ("THRESHOLDS", each(above(0)), "Give a list of numbers above 0; above 1 means never."),
    ("LOCALISATION_THRESHOLDS", each(within(0, 1)), f"{_SHARES}."),
    ("REGION_BUDGET", each(whole(at_least(0))), "Give a list of whole numbers; 0: no limit."),
    ("TIME_BUDGET_MS", at_least(0), "Give milliseconds, 0 or more; 0 means no limit."),
    ("SCORE_SCALES", each(above(0)), "Give a list of numbers above 0."),
    ("SCORE_SHIFTS", each(is_number), "Give a list of numbers."),
    ("EXPECTED_LOSS", is_number, "Give a number; -1 means not calibrated."),
    ("EXPECTED_LOSS_DEVIATION", at_least(0), "Give a number, 0 or more."),
    ("DEVICE_NAME", lambda value: isinstance(value, str), "Give the name of a device, or ''."),
    (
        "WEIGHTS_SHA256",
        lambda value: isinstance(value, str) and re.fullmatch("([0-9a-f]{64})?", value) is not None,
        "Give 64 hexadecimal digits, or ''.",
    ),
    (
        "LEARNED",
        each(lambda part: part in ("iou_head", "gate", "pruner")),
        "Give a list out of 'iou_head', 'gate' and 'pruner'.",
    ),
)
EXIT_RULES: tuple[Rule, ...] = (
    *(Rule(f"{NODE}.{key}", condition, remedy) for key, condition, remedy in _CONDITIONS),
    only(f"{NODE}.CONFIDENCE", "max_prob", "entropy", "margin", "agreement", "learned"),
    only(f"{NODE}.LOCALISATION", "none", "refinement", "predicted_iou"),
    only(f"{NODE}.TIME_BUDGET_PER", "image", "batch"),
)


def exit_lengths(stages: int) -> list[tuple[str, set[int]]]:
    """Every key that holds a tuple, and how many values it may have."""
    lengths = [(f"{NODE}.{key}", {1, stages - 1}) for key in _PER_STAGE]
    return lengths + [(f"{NODE}.{key}", {1, stages}) for key in _PER_GATE]


LENGTH_KEYS = tuple(key for key, _ in exit_lengths(3))
PART_KEYS = tuple(
    f"{NODE}.{key}"
    for key in ("LEARNED", "CONFIDENCE", "LOCALISATION", "THRESHOLDS", "PRUNER_THRESHOLDS")
)


def check_parts(cfg: CfgNode) -> Iterator[str]:
    """Rules that make use of a part which the model does not have."""
    exits = cfg.MODEL.CASCADE.EXIT
    if exits.LEARNED and not exits.ENABLED:
        yield (
            f"{NODE}.LEARNED is {list(exits.LEARNED)}, but ENABLED is False, so that the model has "
            "no such parts. Set ENABLED to True, or LEARNED to ()."
        )
    for part, key, is_used in (
        ("gate", "CONFIDENCE", exits.CONFIDENCE == "learned"),
        ("iou_head", "LOCALISATION", exits.LOCALISATION == "predicted_iou"),
        ("pruner", "PRUNER_THRESHOLDS", any(exits.PRUNER_THRESHOLDS)),
    ):
        if is_used and part not in exits.LEARNED:
            yield (
                f"{NODE}.{key} is {exits[key]!r}, which needs the learned part {part!r}. Add it to "
                f"{NODE}.LEARNED and train it (MODEL.CASCADE.TRAINING.FREEZE_DETECTOR adds it to a "
                "trained detector), or choose another value."
            )


def check_agreement(cfg: CfgNode) -> Iterator[str]:
    """Thresholds of agreement, which are numbers of stages."""
    exits = cfg.MODEL.CASCADE.EXIT
    if exits.CONFIDENCE == "agreement" and not all(
        t >= 1 and t == int(t) for t in exits.THRESHOLDS
    ):
        yield (
            f"{NODE}.THRESHOLDS is {exits.THRESHOLDS!r}, but with CONFIDENCE 'agreement' they are "
            "numbers of stages before that had the same class. Give whole numbers from 1 on, such "
            "as (1,); the number of stages means never."
        )


def check_unused(cfg: CfgNode) -> Iterator[str]:
    """Exits that are asked for from heads that have none."""
    if cfg.MODEL.ROI_HEADS.NAME != "CascadeROIHeads":
        return
    for key, default in EXIT_DEFAULTS.items():
        value = value_of(cfg, f"{NODE}.{key}")
        if _as_tuple(value) != _as_tuple(default):
            yield (
                f"{NODE}.{key} is {value!r}, but MODEL.ROI_HEADS.NAME is "
                "'CascadeROIHeads', a cascade without exits. Set the name to "
                f"EarlyExitCascadeROIHeads, or leave the key at {default!r}."
            )


def exit_arguments(cfg: CfgNode) -> dict[str, Any] | None:
    """When regions leave, as arguments of ``core.ExitPolicy``; ``learned`` are names of parts.

    ``None`` where exits are off, which ``CascadeROIHeads`` means by its name.
    """
    exits = cfg.MODEL.CASCADE.EXIT
    if not exits.ENABLED or cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads":
        return None
    stages = len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
    per_stage = {key.lower(): _for_each(exits[key], stages - 1) for key in _PER_STAGE}
    per_gate = {key.lower(): _for_each(exits[key], stages) for key in _PER_GATE}
    return {
        "num_stages": stages,
        **per_stage,
        **per_gate,
        "proposal_threshold": float(exits.PROPOSAL_THRESHOLD),
        "prune_best": exits.PRUNE_BEST,
        "redundancy_iou": float(exits.REDUNDANCY_IOU) if exits.REDUNDANCY_IOU <= 1 else None,
        "confidence": exits.CONFIDENCE,
        "localisation": exits.LOCALISATION,
        "time_budget_ms": float(exits.TIME_BUDGET_MS),
        "time_budget_per_image": exits.TIME_BUDGET_PER == "image",
        "learned": tuple(exits.LEARNED),
    }


def with_exits(cfg: CfgNode, setting: Mapping[str, Any]) -> CfgNode:
    """A copy of ``cfg`` with exits on, of which ``setting`` names all that are not off.

    Args:
        cfg: of a cascade.
        setting: values by keys of ``MODEL.CASCADE.EXIT``.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.NAME = "EarlyExitCascadeROIHeads"
    for key, value in exit_values(setting).items():
        cfg.MODEL.CASCADE.EXIT[key] = value
    return cfg


def exit_values(setting: Mapping[str, Any]) -> dict[str, Any]:
    """All keys that say who leaves, with what ``setting`` does not name switched off.

    ``LEARNED`` is not among them: those are parts of the model.
    """
    values = {**EXIT_DEFAULTS, **_OFF, **setting}
    return {key: value for key, value in values.items() if key != "LEARNED"}


def _for_each(values: Any, count: int) -> tuple[Any, ...]:
    return tuple(values) * count if len(values) == 1 else tuple(values)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value

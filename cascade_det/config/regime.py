"""``MODEL.CASCADE.TRAINING``: what training does beyond the plain sum of the stages' losses.

A tuple "per stage" has one value for each stage, or a single value that holds for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fvcore.common.config import CfgNode

from cascade_det.config.rules import Rule, above, at_least, each, only, value_of, whole, within

NODE = "MODEL.CASCADE.TRAINING"

TRAINING_DEFAULTS: dict[str, Any] = {
    # Which stages teach a region its class: "none" = all of them; "hard" = the stages up to the
    # first that is confident and right; "soft" = the later ones the less, the more probable the
    # right class was before (confidence-gated training). Box losses have no gates.
    "GATING": "none",
    # Probability from which on a stage is confident, in (0, 1]; "soft" is half closed there.
    "GATE_THRESHOLD": 0.9,
    # Steepness of "soft", > 0. Published code has 1, with which gates hardly move at all.
    "GATE_SCALE": 15.0,
    # Of the losses of a stage: "fixed" = MODEL.CASCADE.STAGE_LOSS_WEIGHTS; "scheduled" = from
    # those, linearly over the iterations, to STAGE_LOSS_WEIGHTS_END; "learned" = those, times a
    # factor for each stage that is trained too, by the uncertainty of the stage.
    "STAGE_WEIGHTING": "fixed",
    "STAGE_LOSS_WEIGHTS_END": (),  # per stage, >= 0; () unless "scheduled"
    # Of one more class loss: that of the ensembles of all subsets of the stages, so that regions
    # may leave after any of them; >= 0, 0 = none. Ensemble "mean_probs" or "mean_logits".
    "PREFIX_LOSS_WEIGHT": 0.0,
    # Dynamic R-CNN: what counts as an object, and where smooth L1 bends, follow the training.
    "DYNAMIC": {
        "ENABLED": False,
        # The mean, over PERIOD, of an image's K_I-th largest IoU is a stage's threshold, between
        # IOU_FLOOR and its value in IOUS; >= 0, 0 = IOUS.
        "K_I": 75,
        # The median, over PERIOD, of the K_BETA-th smallest offset of an image's foreground is a
        # stage's SMOOTH_L1_BETA, up to BETA_START; >= 0, 0 = SMOOTH_L1_BETA.
        "K_BETA": 10,
        # Iterations between changes, >= 1; each of ACCUMULATION_STEPS counts as one.
        "PERIOD": 100,
        "IOU_FLOOR": 0.4,  # in (0, 1)
        "BETA_START": 1.0,  # > 0
    },
    # Train the learned parts of exits alone (EXIT.LEARNED): everything else stays as it is, norms
    # too. In Detectron2 it takes our trainer.
    "FREEZE_DETECTOR": False,
}

TRAINING_RULES: tuple[Rule, ...] = (
    only(f"{NODE}.GATING", "none", "hard", "soft"),
    only(f"{NODE}.STAGE_WEIGHTING", "fixed", "scheduled", "learned"),
    *(
        Rule(f"{NODE}.{key}", condition, remedy)
        for key, condition, remedy in (
            (
                "GATE_THRESHOLD",
                lambda value: above(0)(value) and within(0, 1)(value),
                "Give a number above 0 and up to 1.",
            ),
            ("GATE_SCALE", above(0), "Give a number above 0."),
            ("STAGE_LOSS_WEIGHTS_END", each(at_least(0)), "Give a list of numbers, 0 or more."),
            ("PREFIX_LOSS_WEIGHT", at_least(0), "Give 0 or more; 0 leaves the loss out."),
            ("DYNAMIC.K_I", whole(at_least(0)), "Give 0 or more; 0 keeps the IOUS."),
            ("DYNAMIC.K_BETA", whole(at_least(0)), "Give 0 or more; 0 keeps SMOOTH_L1_BETA."),
            ("DYNAMIC.PERIOD", whole(at_least(1)), "Give 1 or more iterations."),
            (
                "DYNAMIC.IOU_FLOOR",
                lambda value: above(0)(value) and within(0, 1)(value) and value != 1,
                "Give a number between 0 and 1.",
            ),
            ("DYNAMIC.BETA_START", above(0), "Give a number above 0."),
        )
    ),
)

# What check_training relies on.
TRAINING_KEYS = (
    *(rule.key for rule in TRAINING_RULES),
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS",
    "MODEL.CASCADE.STAGE_LOSS_WEIGHTS",
    "MODEL.CASCADE.ENSEMBLE",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE",
)


def check_training(cfg: CfgNode) -> Iterator[str]:
    """Options that contradict each other, the cascade or its exits."""
    yield from _check_weights(cfg)
    yield from _check_dynamic(cfg)
    yield from _check_frozen(cfg)
    training, ensemble = cfg.MODEL.CASCADE.TRAINING, cfg.MODEL.CASCADE.ENSEMBLE
    if training.PREFIX_LOSS_WEIGHT > 0 and ensemble not in ("mean_probs", "mean_logits"):
        yield (
            f"{NODE}.PREFIX_LOSS_WEIGHT is {training.PREFIX_LOSS_WEIGHT}, but "
            f"MODEL.CASCADE.ENSEMBLE is {ensemble!r}, which is no mean over stages that could be "
            "trained. Set it to mean_probs or mean_logits, or the weight to 0."
        )


def _check_weights(cfg: CfgNode) -> Iterator[str]:
    training, stages = cfg.MODEL.CASCADE.TRAINING, len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
    weighting, end = training.STAGE_WEIGHTING, training.STAGE_LOSS_WEIGHTS_END
    if weighting == "scheduled" and len(end) not in {1, stages}:
        yield (
            f"{NODE}.STAGE_LOSS_WEIGHTS_END is {end!r}, but the cascade has {stages} stages and "
            "STAGE_WEIGHTING is 'scheduled'. Give the weights to end with: 1 or "
            f"{stages} values."
        )
    if weighting != "scheduled" and len(end):
        yield (
            f"{NODE}.STAGE_LOSS_WEIGHTS_END is {end!r}, but STAGE_WEIGHTING is {weighting!r}. "
            "Set it to scheduled, or the weights to ()."
        )
    start = cfg.MODEL.CASCADE.STAGE_LOSS_WEIGHTS
    if weighting == "learned" and min(start, default=1) == 0:
        yield (
            f"MODEL.CASCADE.STAGE_LOSS_WEIGHTS is {start!r}, but {NODE}.STAGE_WEIGHTING is "
            "'learned', which has no bounds for a stage without losses. Give weights above 0."
        )


def _check_dynamic(cfg: CfgNode) -> Iterator[str]:
    dynamic, loss = cfg.MODEL.CASCADE.TRAINING.DYNAMIC, cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE
    if not dynamic.ENABLED:
        return
    if not dynamic.K_I and not dynamic.K_BETA:
        yield f"{NODE}.DYNAMIC is enabled, but K_I and K_BETA are both 0. Give one of them a value."
    if dynamic.K_BETA and loss != "smooth_l1":
        yield (
            f"{NODE}.DYNAMIC.K_BETA is {dynamic.K_BETA}, but MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE "
            f"is {loss!r}, which has no beta. Set K_BETA to 0, or the loss to smooth_l1."
        )
    first = cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS[0]
    if dynamic.K_I and first < dynamic.IOU_FLOOR:
        yield (
            f"{NODE}.DYNAMIC.IOU_FLOOR is {dynamic.IOU_FLOOR}, above the first of "
            f"MODEL.ROI_BOX_CASCADE_HEAD.IOUS, {first}. Lower it: IOUS are the upper ends."
        )


def _check_frozen(cfg: CfgNode) -> Iterator[str]:
    training, exits = cfg.MODEL.CASCADE.TRAINING, cfg.MODEL.CASCADE.EXIT
    if not training.FREEZE_DETECTOR:
        return
    if not (exits.ENABLED and exits.LEARNED):
        yield (
            f"{NODE}.FREEZE_DETECTOR is True, but there is nothing else to train: set "
            "MODEL.CASCADE.EXIT.ENABLED to True and name the parts to train in "
            "MODEL.CASCADE.EXIT.LEARNED, such as (iou_head,)."
        )
    idle = {
        "GATING": training.GATING != "none",
        "STAGE_WEIGHTING": training.STAGE_WEIGHTING != "fixed",
        "PREFIX_LOSS_WEIGHT": training.PREFIX_LOSS_WEIGHT > 0,
        "DYNAMIC.ENABLED": training.DYNAMIC.ENABLED,
    }
    for key in (key for key, is_set in idle.items() if is_set):
        yield (
            f"{NODE}.{key} is {value_of(training, key)!r}, which is about the training of the "
            f"detector, but {NODE}.FREEZE_DETECTOR is True. Set one of them back."
        )


def training_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Arguments of ``core.build_training_schedule``."""
    training, stages = cfg.MODEL.CASCADE.TRAINING, len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
    dynamic, end = training.DYNAMIC, tuple(map(float, training.STAGE_LOSS_WEIGHTS_END))
    return {
        "num_stages": stages,
        "gating": None if training.GATING == "none" else training.GATING,
        "gate_threshold": float(training.GATE_THRESHOLD),
        "gate_scale": float(training.GATE_SCALE),
        "stage_weighting": training.STAGE_WEIGHTING,
        "stage_loss_weights_end": end * stages if len(end) == 1 else end,
        "prefix_loss_weight": float(training.PREFIX_LOSS_WEIGHT),
        "dynamic": {
            "k_iou": dynamic.K_I,
            "k_beta": dynamic.K_BETA,
            "period": dynamic.PERIOD,
            "iou_floor": float(dynamic.IOU_FLOOR),
            "beta_start": float(dynamic.BETA_START),
        }
        if dynamic.ENABLED
        else None,
        "exits_alone": training.FREEZE_DETECTOR,
    }

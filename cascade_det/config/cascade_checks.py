"""Checks of the keys of the cascade against each other: stages, exits, training."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fvcore.common.config import CfgNode

from cascade_det.config.cascade_keys import EXIT_DEFAULTS, MASK
from cascade_det.config.tree import as_lists, value_of

# Takes a configuration and yields the problems that it finds.
Check = Callable[[CfgNode], Iterator[str]]

_EXIT = "MODEL.CASCADE.EXIT"
_FAST = "MODEL.CASCADE.FAST"
_TRAINING = "MODEL.CASCADE.TRAINING"
_BOX_HEAD = "MODEL.CASCADE.BOX_HEAD"
PER_STAGE = ("PRUNE_THRESHOLDS", "THRESHOLDS", "LOCALISATION_THRESHOLDS")
PER_GATE = ("PRUNE_MARGINS", "PRUNER_THRESHOLDS", "REGION_BUDGET", "SCORE_SCALES", "SCORE_SHIFTS")


def _lengths(stages: int) -> dict[str, set[int]]:
    """How many values each key may have that holds a list per stage or gate."""
    return {
        "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": {stages},
        "MODEL.CASCADE.STAGE_LOSS_WEIGHTS": {1, stages},
        **{f"{_EXIT}.{key}": {1, stages - 1} for key in PER_STAGE},
        **{f"{_EXIT}.{key}": {1, stages} for key in PER_GATE},
        **{
            f"{_BOX_HEAD}.{key}": {0, 1, stages}
            for key in ("NUM_CONV", "CONV_DIM", "NUM_FC", "FC_DIM", "NORM")
        },
    }


def _check_lengths(cfg: CfgNode) -> Iterator[str]:
    stages = len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
    for key, allowed in _lengths(stages).items():
        value = value_of(cfg, key)
        if len(value) not in allowed:
            yield (
                f"{key} is {value!r}, of length {len(value)}, but MODEL.ROI_BOX_CASCADE_HEAD.IOUS "
                f"has {stages} stages. Give {' or '.join(map(str, sorted(allowed)))} values."
            )


def _check_first_iou(cfg: CfgNode) -> Iterator[str]:
    first, wanted = cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[0], cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS[0]
    if first != wanted:
        yield (
            f"MODEL.ROI_HEADS.IOU_THRESHOLDS is [{first}], but the first of "
            f"MODEL.ROI_BOX_CASCADE_HEAD.IOUS is {wanted}. Give both the same value."
        )


def _check_gates_off(cfg: CfgNode) -> Iterator[str]:
    stages, off = len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS), cfg.MODEL.CASCADE.EXIT.GATES_OFF
    if any(gate >= stages for gate in off):
        yield (
            f"{_EXIT}.GATES_OFF is {off!r}, but {stages} stages have the gates 0 to {stages - 1}. "
            "Leave out the others."
        )


def _check_parts(cfg: CfgNode) -> Iterator[str]:
    """Exit rules that use a learned part need that part."""
    exits = cfg.MODEL.CASCADE.EXIT
    if exits.LEARNED and not exits.ENABLED:
        yield (
            f"{_EXIT}.LEARNED is {list(exits.LEARNED)}, but ENABLED is False, so the model has no "
            "such parts. Set ENABLED to True, or LEARNED to ()."
        )
    for part, key, is_used in (
        ("gate", "CONFIDENCE", exits.CONFIDENCE == "learned"),
        ("iou_head", "LOCALISATION", exits.LOCALISATION == "predicted_iou"),
        ("pruner", "PRUNER_THRESHOLDS", any(exits.PRUNER_THRESHOLDS)),
    ):
        if is_used and part not in exits.LEARNED:
            yield (
                f"{_EXIT}.{key} is {exits[key]!r}, which needs the learned part {part!r}. Add it "
                f"to {_EXIT}.LEARNED and train it ({_TRAINING}.FREEZE_DETECTOR adds it to a "
                "trained detector), or choose another value."
            )


def _check_agreement(cfg: CfgNode) -> Iterator[str]:
    """Thresholds of agreement count stages."""
    exits = cfg.MODEL.CASCADE.EXIT
    if exits.CONFIDENCE == "agreement" and not all(
        t >= 1 and t == int(t) for t in exits.THRESHOLDS
    ):
        yield (
            f"{_EXIT}.THRESHOLDS is {exits.THRESHOLDS!r}, but with CONFIDENCE 'agreement' they are "
            "numbers of stages before that had the same class. Give whole numbers from 1 on, such "
            "as (1,); the number of stages means never."
        )


def check_exits_unused(cfg: CfgNode) -> Iterator[str]:
    """Report exits that are set for ``CascadeROIHeads``, which has none."""
    if cfg.MODEL.ROI_HEADS.NAME != "CascadeROIHeads":
        return
    for key, default in EXIT_DEFAULTS.items():
        value = value_of(cfg, f"{_EXIT}.{key}")
        if as_lists(value) != as_lists(default):
            yield (
                f"{_EXIT}.{key} is {value!r}, but MODEL.ROI_HEADS.NAME is "
                "'CascadeROIHeads', a cascade without exits. Set the name to "
                f"EarlyExitCascadeROIHeads, or leave the key at {default!r}."
            )


def _check_masks_unused(cfg: CfgNode) -> Iterator[str]:
    if cfg.MODEL.MASK_ON:
        return
    for name, key in MASK.keys.items():
        value = cfg.MODEL.CASCADE.MASK[name]
        if value != key.default:
            yield (
                f"MODEL.CASCADE.MASK.{name} is {value!r}, but MODEL.MASK_ON is False. Set it to "
                f"True, or leave the key at {key.default!r}."
            )


def _check_fast(cfg: CfgNode) -> Iterator[str]:
    fast = cfg.MODEL.CASCADE.FAST
    if fast.ENABLED and fast.DTYPE == "float16" and cfg.MODEL.DEVICE == "cpu":
        yield (
            f"{_FAST}.DTYPE is 'float16', but MODEL.DEVICE is cpu. Give 'auto', or 'bfloat16' on a "
            "CPU that has instructions for it."
        )
    if fast.ENABLED and fast.DTYPE == "int8" and not fast.IMAGES:
        yield (
            f"{_FAST}.DTYPE is 'int8', but {_FAST}.IMAGES is 0: the ranges of maps are measured on "
            "training images. Give a number of them, such as 32."
        )
    if fast.ENABLED and fast.IMAGES and not cfg.DATASETS.TRAIN:
        yield (
            f"{_FAST}.IMAGES is {fast.IMAGES}, but DATASETS.TRAIN is empty. Name the data that the "
            f"weights were trained on, or set {_FAST}.IMAGES to 0."
        )


def _check_prefix_loss(cfg: CfgNode) -> Iterator[str]:
    training, ensemble = cfg.MODEL.CASCADE.TRAINING, cfg.MODEL.CASCADE.ENSEMBLE
    if training.PREFIX_LOSS_WEIGHT > 0 and ensemble not in ("mean_probs", "mean_logits"):
        yield (
            f"{_TRAINING}.PREFIX_LOSS_WEIGHT is {training.PREFIX_LOSS_WEIGHT}, but "
            f"MODEL.CASCADE.ENSEMBLE is {ensemble!r}, which is not a mean over stages, "
            "so it has no prefix loss. Set it to mean_probs or mean_logits, or the weight to 0."
        )


def _check_weights(cfg: CfgNode) -> Iterator[str]:
    training, stages = cfg.MODEL.CASCADE.TRAINING, len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
    weighting, end = training.STAGE_WEIGHTING, training.STAGE_LOSS_WEIGHTS_END
    if weighting == "scheduled" and len(end) not in {1, stages}:
        yield (
            f"{_TRAINING}.STAGE_LOSS_WEIGHTS_END is {end!r}, but the cascade has {stages} stages "
            "and STAGE_WEIGHTING is 'scheduled'. Give the weights to end with: 1 or "
            f"{stages} values."
        )
    if weighting != "scheduled" and len(end):
        yield (
            f"{_TRAINING}.STAGE_LOSS_WEIGHTS_END is {end!r}, but STAGE_WEIGHTING is {weighting!r}. "
            "Set it to scheduled, or the weights to ()."
        )
    start = cfg.MODEL.CASCADE.STAGE_LOSS_WEIGHTS
    if weighting == "learned" and min(start, default=1) == 0:
        yield (
            f"MODEL.CASCADE.STAGE_LOSS_WEIGHTS is {start!r}, but {_TRAINING}.STAGE_WEIGHTING is "
            "'learned', which has no bounds for a stage without losses. Give weights above 0."
        )


def _check_class_weights(cfg: CfgNode) -> Iterator[str]:
    weights, classes = cfg.MODEL.CASCADE.TRAINING.CLASS_WEIGHTS, cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if len(weights) not in (0, classes + 1):
        yield (
            f"{_TRAINING}.CLASS_WEIGHTS has {len(weights)} values, but MODEL.ROI_HEADS.NUM_CLASSES "
            f"is {classes}. Give {classes + 1}, the last for background, or ()."
        )
    elif weights and not any(weights):
        yield f"{_TRAINING}.CLASS_WEIGHTS are all 0, so no class is learned. Give one above 0."


def _check_dynamic(cfg: CfgNode) -> Iterator[str]:
    dynamic, loss = cfg.MODEL.CASCADE.TRAINING.DYNAMIC, cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE
    if not dynamic.ENABLED:
        return
    if not dynamic.K_I and not dynamic.K_BETA:
        yield (
            f"{_TRAINING}.DYNAMIC is enabled, but K_I and K_BETA are both 0. Give one of them a "
            "value."
        )
    if dynamic.K_BETA and loss != "smooth_l1":
        yield (
            f"{_TRAINING}.DYNAMIC.K_BETA is {dynamic.K_BETA}, but "
            f"MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE is {loss!r}, which has no beta. Set K_BETA to "
            "0, or the loss to smooth_l1."
        )
    first = cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS[0]
    if dynamic.K_I and first < dynamic.IOU_FLOOR:
        yield (
            f"{_TRAINING}.DYNAMIC.IOU_FLOOR is {dynamic.IOU_FLOOR}, above the first of "
            f"MODEL.ROI_BOX_CASCADE_HEAD.IOUS, {first}. Lower it: IOUS are the upper ends."
        )


def _check_frozen(cfg: CfgNode) -> Iterator[str]:
    training, exits = cfg.MODEL.CASCADE.TRAINING, cfg.MODEL.CASCADE.EXIT
    if not training.FREEZE_DETECTOR:
        return
    if not (exits.ENABLED and exits.LEARNED):
        yield (
            f"{_TRAINING}.FREEZE_DETECTOR is True, but there is nothing else to train: set "
            "MODEL.CASCADE.EXIT.ENABLED to True and name the parts to train in "
            "MODEL.CASCADE.EXIT.LEARNED, such as (iou_head,)."
        )
    idle = {
        "CLASS_LOSS": training.CLASS_LOSS != "cross_entropy",
        "CLASS_WEIGHTS": len(training.CLASS_WEIGHTS) > 0,
        "GATING": training.GATING != "none",
        "STAGE_WEIGHTING": training.STAGE_WEIGHTING != "fixed",
        "PREFIX_LOSS_WEIGHT": training.PREFIX_LOSS_WEIGHT > 0,
        "DYNAMIC.ENABLED": training.DYNAMIC.ENABLED,
    }
    for key in (key for key, is_set in idle.items() if is_set):
        yield (
            f"{_TRAINING}.{key} is {value_of(training, key)!r}, which is about the training of the "
            f"detector, but {_TRAINING}.FREEZE_DETECTOR is True. Set one of them back."
        )


HEAD_CHECKS: tuple[Check, ...] = (
    _check_lengths,
    _check_weights,
    _check_class_weights,
    _check_prefix_loss,
    _check_dynamic,
    _check_frozen,
    _check_parts,
    _check_gates_off,
    _check_masks_unused,
    _check_fast,
    _check_agreement,
    _check_first_iou,
)

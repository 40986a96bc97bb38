"""Keys of ``MODEL`` as plain keyword arguments. Nothing is checked here: see ``checks``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fvcore.common.config import CfgNode

from cascade_det.config.cascade_checks import PER_GATE, PER_STAGE
from cascade_det.config.cascade_keys import EXIT_DEFAULTS

# Together with the defaults: no rule is on.
_NO_RULES: dict[str, Any] = {"ENABLED": True, "PRUNE_THRESHOLDS": (0.0,), "REDUNDANCY_IOU": 1.01}


def detector_arguments(cfg: CfgNode) -> dict[str, Any]:
    """How images are normalised: ``pixel_mean`` and ``pixel_std``, 3 floats in 0..255 each.

    Their channel order is ``INPUT.FORMAT``, as that of the image tensor.
    """
    return {"pixel_mean": _floats(cfg.MODEL.PIXEL_MEAN), "pixel_std": _floats(cfg.MODEL.PIXEL_STD)}


def rpn_arguments(cfg: CfgNode) -> dict[str, Any]:
    """The proposal generator, with anchor sizes (pixels) and ratios (H/W) for each level.

    ``pre_nms_topk`` (per level) and ``post_nms_topk`` (per image) are (training, inference); -1 in
    ``conv_dims`` is the number of input channels.
    """
    rpn, anchors = cfg.MODEL.RPN, cfg.MODEL.ANCHOR_GENERATOR
    levels = len(rpn.IN_FEATURES)
    return {
        "in_features": tuple(rpn.IN_FEATURES),
        "anchor_sizes": tuple(map(_floats, _for_each(anchors.SIZES, levels))),
        "aspect_ratios": tuple(map(_floats, _for_each(anchors.ASPECT_RATIOS, levels))),
        "anchor_offset": anchors.OFFSET,
        "conv_dims": tuple(rpn.CONV_DIMS),
        "iou_thresholds": _floats(rpn.IOU_THRESHOLDS),
        "batch_size_per_image": rpn.BATCH_SIZE_PER_IMAGE,
        "positive_fraction": rpn.POSITIVE_FRACTION,
        "pre_nms_topk": (rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST),
        "post_nms_topk": (rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST),
        "nms_thresh": rpn.NMS_THRESH,
        "min_box_size": float(cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE),
        "bbox_reg_weights": _floats(rpn.BBOX_REG_WEIGHTS),
        "box_reg_loss_type": rpn.BBOX_REG_LOSS_TYPE,
        "smooth_l1_beta": rpn.SMOOTH_L1_BETA,
        "loss_weights": {
            "loss_rpn_cls": rpn.LOSS_WEIGHT,
            "loss_rpn_loc": rpn.BBOX_REG_LOSS_WEIGHT * rpn.LOSS_WEIGHT,
        },
    }


def rpn_channels(cfg: CfgNode) -> int:
    """Channels of the hidden maps of an RPN on a feature pyramid."""
    last = (-1, *cfg.MODEL.RPN.CONV_DIMS)[-1]
    channels: int = cfg.MODEL.FPN.OUT_CHANNELS if last == -1 else last
    return channels


def pooler_arguments(cfg: CfgNode) -> dict[str, Any]:
    """RoI pooling; ``aligned`` is the half-pixel shift of ROIAlignV2."""
    head = cfg.MODEL.ROI_BOX_HEAD
    return {
        "in_features": tuple(cfg.MODEL.ROI_HEADS.IN_FEATURES),
        "output_size": head.POOLER_RESOLUTION,
        "sampling_ratio": head.POOLER_SAMPLING_RATIO,
        "aligned": head.POOLER_TYPE == "ROIAlignV2",
        "kernel": cfg.MODEL.CASCADE.POOLER_KERNEL,
    }


def mask_head_arguments(cfg: CfgNode) -> dict[str, Any] | None:
    """The mask heads; ``None`` where masks are off.

    ``per_stage``: one head for every stage, or one for all. ``pooler``, ``layers`` and ``rules``
    are arguments of ``core.RoIPooler``, ``core.ConvUpsampleMaskHead`` and ``core.MaskRules``.
    """
    if not cfg.MODEL.MASK_ON:
        return None
    head, masks = cfg.MODEL.ROI_MASK_HEAD, cfg.MODEL.CASCADE.MASK
    return {
        "per_stage": masks.STAGES == "every",
        "pooler": {
            "output_size": head.POOLER_RESOLUTION,
            "sampling_ratio": head.POOLER_SAMPLING_RATIO,
            "aligned": head.POOLER_TYPE == "ROIAlignV2",
            "kernel": cfg.MODEL.CASCADE.POOLER_KERNEL,
        },
        "layers": {
            "conv_dims": (head.CONV_DIM,) * head.NUM_CONV,
            "upsampled_dim": head.CONV_DIM,
            "norm": head.NORM,
            "num_masks": 1 if head.CLS_AGNOSTIC_MASK else cfg.MODEL.ROI_HEADS.NUM_CLASSES,
        },
        "rules": {
            "score_threshold": float(masks.SCORE_THRESHOLD),
            "redundancy_iou": float(masks.REDUNDANCY) if masks.REDUNDANCY <= 1 else None,
        },
    }


def box_head_configs(cfg: CfgNode) -> list[CfgNode]:
    """A configuration for each stage, whose ``MODEL.ROI_BOX_HEAD`` describes its box head."""
    own = cfg.MODEL.CASCADE.BOX_HEAD
    stages = len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
    configs = [cfg.clone() for _ in range(stages)]
    for key in own:
        values = _for_each(own[key] or (cfg.MODEL.ROI_BOX_HEAD[key],), stages)
        for stage, value in zip(configs, values, strict=True):
            stage.defrost()
            stage.MODEL.ROI_BOX_HEAD[key] = value
    return configs


def box_head_arguments(cfg: CfgNode) -> list[dict[str, Any]]:
    """The layers of each stage's box head: ``conv_dims``, then ``fc_dims``, and ``norm``."""
    heads = [stage.MODEL.ROI_BOX_HEAD for stage in box_head_configs(cfg)]
    return [
        {
            "conv_dims": (head.CONV_DIM,) * head.NUM_CONV,
            "fc_dims": (head.FC_DIM,) * head.NUM_FC,
            "norm": head.NORM,
        }
        for head in heads
    ]


def cascade_arguments(cfg: CfgNode) -> dict[str, Any]:
    """The cascade without its pooler, heads and exits; tuples have one value per stage."""
    heads, head = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
    cascade = cfg.MODEL.ROI_BOX_CASCADE_HEAD
    stages = len(cascade.IOUS)
    return {
        "num_classes": heads.NUM_CLASSES,
        "ious": _floats(cascade.IOUS),
        "bbox_reg_weights": tuple(map(_floats, cascade.BBOX_REG_WEIGHTS)),
        "cls_agnostic_bbox_reg": head.CLS_AGNOSTIC_BBOX_REG,
        "box_reg_loss_type": head.BBOX_REG_LOSS_TYPE,
        "smooth_l1_beta": head.SMOOTH_L1_BETA,
        "box_reg_loss_weight": head.BBOX_REG_LOSS_WEIGHT,
        "stage_loss_weights": _floats(_for_each(cfg.MODEL.CASCADE.STAGE_LOSS_WEIGHTS, stages)),
        "batch_size_per_image": heads.BATCH_SIZE_PER_IMAGE,
        "positive_fraction": heads.POSITIVE_FRACTION,
        "proposal_append_gt": heads.PROPOSAL_APPEND_GT,
        "ensemble": cfg.MODEL.CASCADE.ENSEMBLE,
        "score_thresh": heads.SCORE_THRESH_TEST,
        "nms_thresh": heads.NMS_THRESH_TEST,
        "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        "suppression": cfg.MODEL.CASCADE.SUPPRESSION,
        "suppression_sigma": float(cfg.MODEL.CASCADE.SUPPRESSION_SIGMA),
    }


def exit_arguments(cfg: CfgNode) -> dict[str, Any] | None:
    """Arguments of ``core.ExitPolicy``; ``learned`` are names of parts.

    ``None`` where exits are off, as they always are in ``CascadeROIHeads``.
    """
    exits = cfg.MODEL.CASCADE.EXIT
    if not exits.ENABLED or cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads":
        return None
    stages = len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
    per_stage = {key.lower(): _for_each(exits[key], stages - 1) for key in PER_STAGE}
    per_gate = {key.lower(): _for_each(exits[key], stages) for key in PER_GATE}
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
        "gates_off": tuple(exits.GATES_OFF),
        "tile_threshold": float(exits.TILE_THRESHOLD),
        "learned": tuple(exits.LEARNED),
    }


def with_exits(cfg: CfgNode, setting: Mapping[str, Any]) -> CfgNode:
    """A copy of ``cfg`` with exits on, and only the rules that ``setting`` names.

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
    """All keys of exit rules; rules that ``setting`` does not name are off.

    ``LEARNED`` is not among them: it names parts of the model.
    """
    values = {**EXIT_DEFAULTS, **_NO_RULES, **setting}
    return {key: value for key, value in values.items() if key != "LEARNED"}


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
    """The type of the box heads under FAST, by name; ``None`` where FAST is off."""
    fast = cfg.MODEL.CASCADE.FAST
    if not fast.ENABLED:
        return None
    if fast.DTYPE == "int8":  # is for whole models
        return "auto"
    return "float32" if "roi_heads" in fast.FLOAT32_PARTS else fast.DTYPE


def training_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Arguments of ``core.build_training_schedule``."""
    training, stages = cfg.MODEL.CASCADE.TRAINING, len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
    dynamic, end = training.DYNAMIC, tuple(map(float, training.STAGE_LOSS_WEIGHTS_END))
    return {
        "num_stages": stages,
        "class_loss": _class_loss_arguments(cfg),
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


def _class_loss_arguments(cfg: CfgNode) -> dict[str, Any] | None:
    training = cfg.MODEL.CASCADE.TRAINING
    if training.CLASS_LOSS == "cross_entropy" and not training.CLASS_WEIGHTS:
        return None
    return {
        "kind": training.CLASS_LOSS,
        "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
        "class_weights": _floats(training.CLASS_WEIGHTS),
        "focal_gamma": float(training.FOCAL_GAMMA),
        "seesaw_p": float(training.SEESAW_P),
        "seesaw_q": float(training.SEESAW_Q),
    }


def _floats(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _for_each(values: Sequence[Any], count: int) -> tuple[Any, ...]:
    """One value for each of ``count``; a single value holds for all of them."""
    return tuple(values) * count if len(values) == 1 else tuple(values)

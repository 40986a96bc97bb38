"""Keys of a segmenter as plain keyword arguments."""

from __future__ import annotations

from typing import Any

from fvcore.common.config import CfgNode


def is_segmenter(cfg: CfgNode) -> bool:
    """Whether the model is a semantic segmenter, and no detector."""
    return bool(cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor")


def segmenter_arguments(cfg: CfgNode) -> dict[str, Any]:
    """The semantic head: its ``in_features``, ``head``, ``loss`` and ``loss_weight``.

    ``dual_scale`` has the arguments of two scales, or is ``None``.
    """
    head, decoder = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.CASCADE_DECODER
    scales = cfg.MODEL.DUAL_SCALE
    return {
        "in_features": tuple(head.IN_FEATURES),
        "head": {
            "num_classes": head.NUM_CLASSES,
            "fuse": decoder.FUSE,
            "finest_gate": decoder.FINEST_GATE or None,
            "exits": map_exit_arguments(cfg) if decoder.EXIT.ENABLED else None,
        },
        "loss": {
            "subsets": decoder.SUBSETS,
            "mean": decoder.SUBSET_MEAN,
            "ce_weight": float(decoder.CE_WEIGHT),
            "dice_weight": float(decoder.DICE_WEIGHT),
            "ignore_value": head.IGNORE_VALUE,
        },
        "loss_weight": float(head.LOSS_WEIGHT),
        "dual_scale": None
        if scales.MODE == "off"
        else {"mode": scales.MODE, "sizes": tuple(scales.SIZES), "grey": scales.GREY},
    }


def map_exit_arguments(cfg: CfgNode) -> dict[str, Any]:
    """The exits of a decoder, whether or not they are enabled."""
    exits = cfg.MODEL.CASCADE_DECODER.EXIT
    thresholds = [float(value) for value in exits.THRESHOLDS]
    if len(thresholds) == 1:
        thresholds *= len(cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES) - 1
    return {
        "kind": exits.KIND,
        "confidence": exits.CONFIDENCE,
        "thresholds": thresholds,
        "patch": exits.PATCH,
        "channel_gates": exits.CHANNEL_GATES,
    }

"""Checks of the keys of a segmenter against each other."""

from __future__ import annotations

from collections.abc import Iterator

from fvcore.common.config import CfgNode

from cascade_det.config.backbone_arguments import BACKBONES, TRUNKS, backbone_maps, trunk_maps
from cascade_det.config.cascade_checks import Check
from cascade_det.config.model_checks import BACKBONE_CHECKS
from cascade_det.config.segmenter_arguments import is_segmenter
from cascade_det.config.tree import value_of
from cascade_det.errors import ConfigError

_MAXVIT, _MAXVIT_STEP = "build_maxvit_backbone", 32
# What a segmenter would ignore.
_OF_DETECTORS = (
    "MODEL.MASK_ON",
    "MODEL.CASCADE.EXIT.ENABLED",
    "MODEL.CASCADE.FAST.COMPILE",
    "MODEL.CASCADE.FAST.FLOAT32_PARTS",
    "MODEL.CASCADE.FAST.IMAGES",
    "TEST.AUG.ENABLED",
    "CASCADE.SHADOW_SHARE",
    "CASCADE.LVIS_AP",
    "CASCADE.FAST_AP",
    "CASCADE.AUGMENT",
    "INPUT.CROP.ENABLED",
)


def check_levels(cfg: CfgNode) -> Iterator[str]:
    """A decoder has two levels or more, and a loss."""
    names = list(cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES)
    if len(names) < 2:
        yield f"MODEL.SEM_SEG_HEAD.IN_FEATURES is {names}. Give two maps or more, finest first."
    decoder = cfg.MODEL.CASCADE_DECODER
    thresholds = list(decoder.EXIT.THRESHOLDS)
    if decoder.EXIT.ENABLED and len(thresholds) not in (1, len(names) - 1):
        yield (
            f"MODEL.CASCADE_DECODER.EXIT.THRESHOLDS is {thresholds}. Give one number, or one for "
            f"each of the {len(names)} levels but the finest."
        )
    if decoder.EXIT.ENABLED and cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES < 2:
        yield (
            "MODEL.CASCADE_DECODER.EXIT.ENABLED is True, but MODEL.SEM_SEG_HEAD.NUM_CLASSES is 1: "
            "a single class is always certain. Count the background as a class."
        )
    if decoder.CE_WEIGHT == decoder.DICE_WEIGHT == 0:
        yield (
            "MODEL.CASCADE_DECODER.CE_WEIGHT and DICE_WEIGHT are both 0. Give one of them a "
            "weight: there is no other loss."
        )


def _check_maps(cfg: CfgNode) -> Iterator[str]:
    names = list(cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES)
    is_trunk = cfg.MODEL.BACKBONE.NAME in TRUNKS
    if not is_trunk and any(problem for check in BACKBONE_CHECKS for problem in check(cfg)):
        return
    known = list((trunk_maps if is_trunk else backbone_maps)(cfg))
    start = known.index(names[0]) if names and names[0] in known else 0
    if names != known[start : start + len(names)]:
        yield (
            f"MODEL.SEM_SEG_HEAD.IN_FEATURES is {names}. Give neighbouring levels, finest first, "
            f"out of {known}."
        )
    outputs = cfg.MODEL.RESNETS.OUT_FEATURES
    missing = [name for name in names if name not in outputs]
    if cfg.MODEL.BACKBONE.NAME == "build_resnet_backbone" and missing:
        yield (
            f"MODEL.RESNETS.OUT_FEATURES is {outputs}, but MODEL.SEM_SEG_HEAD.IN_FEATURES needs "
            f"{', '.join(missing)}. Add it."
        )


def _check_pyramid(cfg: CfgNode) -> Iterator[str]:
    if cfg.MODEL.BACKBONE.NAME not in TRUNKS:
        for check in BACKBONE_CHECKS:
            yield from check(cfg)


def _check_scales(cfg: CfgNode) -> Iterator[str]:
    name, scales = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.DUAL_SCALE
    mode, sizes = scales.MODE, list(scales.SIZES)
    if mode != "off" and cfg.MODEL.CASCADE_DECODER.EXIT.ENABLED:
        yield (
            f"MODEL.CASCADE_DECODER.EXIT.ENABLED is True, but MODEL.DUAL_SCALE.MODE is {mode!r}: "
            "two scales have no exits. Set the first to False or the second to 'off'."
        )
    if mode == "off":
        if name == _MAXVIT:
            yield (
                f"MODEL.BACKBONE.NAME is {name!r}, which takes squares of one size, but "
                "MODEL.DUAL_SCALE.MODE is 'off'. Set that to 'parallel' or 'cascaded', or take "
                "another trunk."
            )
    elif name in BACKBONES:
        trunk, _ = BACKBONES[name]
        yield (
            f"MODEL.DUAL_SCALE.MODE is {mode!r}, but {name} has a pyramid: each scale has a trunk "
            f"alone. Take build_{trunk}_backbone."
        )
    elif name == _MAXVIT and any(side % _MAXVIT_STEP for side in sizes):
        yield (
            f"MODEL.DUAL_SCALE.SIZES is {sizes}, but {name} takes multiples of {_MAXVIT_STEP}. "
            "Give these, such as [256, 224]."
        )


def check_unread(cfg: CfgNode) -> Iterator[str]:
    """A run of a segmenter has none of what only detectors have."""
    for key in _OF_DETECTORS:
        if value := value_of(cfg, key):
            yield f"{key} is {value}, but segmenters do not have that. Set it to {type(value)()}."
    if (sampler := cfg.DATALOADER.SAMPLER_TRAIN) != "TrainingSampler":
        yield (
            f"DATALOADER.SAMPLER_TRAIN is {sampler!r}, but segmenters do not have that. Set it to "
            "'TrainingSampler'."
        )


def check_not_fast(cfg: CfgNode) -> Iterator[str]:
    """A segmenter in Detectron2 is not optimised."""
    if cfg.MODEL.CASCADE.FAST.ENABLED:
        yield (
            "MODEL.CASCADE.FAST.ENABLED is True, but segmenters in Detectron2 do not have that. "
            "Set it to False, or use --host standalone."
        )


def check_fast(cfg: CfgNode) -> Iterator[str]:
    """A segmenter in the standalone host is optimised with one scale, and in float32 only."""
    if not cfg.MODEL.CASCADE.FAST.ENABLED:
        return
    if cfg.MODEL.DUAL_SCALE.MODE != "off":
        yield (
            "MODEL.CASCADE.FAST.ENABLED is True, but segmenters with two scales "
            "(MODEL.DUAL_SCALE.MODE) do not have that. Set it to False."
        )
    if (dtype := cfg.MODEL.CASCADE.FAST.DTYPE) not in ("auto", "float32"):
        yield (
            f"MODEL.CASCADE.FAST.DTYPE is {dtype!r}, but optimised segmenters compute in float32. "
            "Give 'auto' or 'float32'."
        )


def require_detector(cfg: CfgNode) -> None:
    """Check that the model is a detector.

    Raises:
        ConfigError: it is a segmenter.
    """
    if is_segmenter(cfg):
        raise ConfigError(
            "MODEL.META_ARCHITECTURE is 'SemanticSegmentor', but this is for detectors, "
            "'GeneralizedRCNN'. Segmenters are built by build_segmenter."
        )


def require_one_scale(cfg: CfgNode) -> None:
    """Check that a segmenter has one scale.

    Raises:
        ConfigError: it has two.
    """
    if (mode := cfg.MODEL.DUAL_SCALE.MODE) != "off":
        raise ConfigError(
            f"MODEL.DUAL_SCALE.MODE is {mode!r}, but this is for segmenters with one scale, 'off'."
        )


SEGMENTER_CHECKS: tuple[Check, ...] = (check_levels, _check_pyramid, _check_maps, _check_scales)

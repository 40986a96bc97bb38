"""Checks that the parts and feature maps that a configuration names exist in Detectron2."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from detectron2.config import CfgNode
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)
from fvcore.common.registry import Registry

from cascade_det.config.backbone_arguments import BACKBONES, backbone_maps, trunk_maps
from cascade_det.config.key import shown
from cascade_det.config.tree import value_of
from cascade_det.errors import ConfigError

_WITH_ROI_HEADS = ("GeneralizedRCNN", "PanopticFPN")
_WITH_SEMANTIC_HEAD = ("SemanticSegmentor", "PanopticFPN")
_WITH_RPN = (*_WITH_ROI_HEADS, "ProposalNetwork")
_STAGE_MASKS = {
    "NAME": ("MaskRCNNConvUpsampleHead", "StageMaskHeads"),
    "POOLER_TYPE": ("ROIAlignV2", "ROIAlign"),
    "NORM": ("", "GN", "BN", "SyncBN"),
}


def check_model(cfg: CfgNode) -> None:
    """Check the registered names of a model's parts and the feature maps of its backbone.

    Raises:
        ConfigError: lists all errors, each with key, value and remedy.
    """
    errors = [*_unknown_parts(cfg), *_unknown_maps(cfg)]
    if errors:
        listed = "\n  - ".join(errors)
        raise ConfigError(f"Detectron2 cannot build this model:\n  - {listed}")


def check_box_heads(cfg: CfgNode, maps: Collection[str]) -> None:
    """Check the name of the box heads and the feature maps that they pool.

    Args:
        cfg: a configuration.
        maps: names of the backbone's feature maps.

    Raises:
        ConfigError: lists all errors; for C4 models, which have no box heads, too.
    """
    errors = [
        *_not_in("MODEL.ROI_BOX_HEAD.NAME", ROI_BOX_HEAD_REGISTRY, cfg),
        *_not_among("MODEL.ROI_HEADS.IN_FEATURES", maps, cfg),
    ]
    if errors:
        listed = "\n  - ".join(errors)
        raise ConfigError(
            f"EarlyExitCascadeROIHeads cannot be built:\n  - {listed}\nThey are for models with a "
            "feature pyramid and box heads of their own, such as Base-RCNN-FPN.yaml; Detectron2's "
            "C4 models have neither."
        )


def check_mask_heads(cfg: CfgNode) -> None:
    """Check the kind of the mask heads, which are ours where every stage has one.

    Raises:
        ConfigError: names key, value and remedy.
    """
    errors = list(_not_in("MODEL.ROI_MASK_HEAD.NAME", ROI_MASK_HEAD_REGISTRY, cfg))
    if cfg.MODEL.CASCADE.MASK.STAGES == "every":
        errors += [
            f"MODEL.ROI_MASK_HEAD.{name} is {shown(value)}, but MODEL.CASCADE.MASK.STAGES is "
            f"'every'. Supported: {', '.join(map(shown, allowed))}; other mask heads need 'last'."
            for name, allowed in _STAGE_MASKS.items()
            if (value := cfg.MODEL.ROI_MASK_HEAD[name]) not in allowed
        ]
    if errors:
        listed = "\n  - ".join(errors)
        raise ConfigError(f"The mask heads cannot be built:\n  - {listed}")


def refuse_tile_head(parts: Collection[str]) -> None:
    """Refuse the training of a tile head, for which Detectron2's RPN tells too little.

    Args:
        parts: names of the learned parts of exits.

    Raises:
        ConfigError: the tile head is among them.
    """
    if "tile_head" in parts:
        raise ConfigError(
            f"MODEL.CASCADE.EXIT.LEARNED is {list(parts)}, but 'tile_head' cannot be trained in "
            "Detectron2, whose RPN does not tell which anchors its proposals come from. Train it "
            "in the standalone host, where MODEL.CASCADE.TRAINING.FREEZE_DETECTOR adds it to "
            "Detectron2's checkpoints too; the result runs in both hosts. Or leave it out."
        )


def _unknown_parts(cfg: CfgNode) -> Iterator[str]:
    model = cfg.MODEL
    yield from _not_in("MODEL.META_ARCHITECTURE", META_ARCH_REGISTRY, cfg)
    yield from _not_in("MODEL.BACKBONE.NAME", BACKBONE_REGISTRY, cfg)
    if model.META_ARCHITECTURE in _WITH_ROI_HEADS:
        yield from _not_in("MODEL.ROI_HEADS.NAME", ROI_HEADS_REGISTRY, cfg)
        if model.MASK_ON:
            yield from _not_in("MODEL.ROI_MASK_HEAD.NAME", ROI_MASK_HEAD_REGISTRY, cfg)
    if model.META_ARCHITECTURE in _WITH_SEMANTIC_HEAD:
        yield from _not_in("MODEL.SEM_SEG_HEAD.NAME", SEM_SEG_HEADS_REGISTRY, cfg)
    if (
        model.META_ARCHITECTURE in _WITH_RPN
        and model.PROPOSAL_GENERATOR.NAME != "PrecomputedProposals"
    ):
        yield from _not_in("MODEL.PROPOSAL_GENERATOR.NAME", PROPOSAL_GENERATOR_REGISTRY, cfg)
        yield from _not_in("MODEL.RPN.HEAD_NAME", RPN_HEAD_REGISTRY, cfg)
        yield from _not_in("MODEL.ANCHOR_GENERATOR.NAME", ANCHOR_GENERATOR_REGISTRY, cfg)


def _unknown_maps(cfg: CfgNode) -> Iterator[str]:
    """Errors in feature-map names, for backbones whose maps follow from the configuration."""
    model = cfg.MODEL
    if model.BACKBONE.NAME not in BACKBONES:
        return
    inputs, known = tuple(model.FPN.IN_FEATURES), trunk_maps(cfg)
    if not inputs or inputs != known[-len(inputs) :]:
        yield (
            f"MODEL.FPN.IN_FEATURES is {list(inputs)}, but {model.BACKBONE.NAME} has a feature "
            f"pyramid: give neighbouring levels up to the coarsest, such as {list(known)}, or "
            "the configuration of a model with one as _BASE_."
        )
        return
    outputs = backbone_maps(cfg)
    if model.META_ARCHITECTURE in _WITH_RPN:
        yield from _not_among("MODEL.RPN.IN_FEATURES", outputs, cfg)
    if model.META_ARCHITECTURE in _WITH_ROI_HEADS:
        yield from _not_among("MODEL.ROI_HEADS.IN_FEATURES", outputs, cfg)


def _not_in(key: str, registry: Registry, cfg: CfgNode) -> Iterator[str]:
    name = value_of(cfg, key)
    if name not in registry:
        known = ", ".join(sorted(known for known, _ in registry))
        yield f"{key} is {shown(name)}, which is not registered. Registered are {known}."


def _not_among(key: str, maps: Collection[str], cfg: CfgNode) -> Iterator[str]:
    names = list(value_of(cfg, key))
    if not names or not set(names) <= set(maps):
        yield f"{key} is {names}, but the maps of the backbone are {', '.join(maps)}. Name these."

"""Checks of the keys of the detector against each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from fvcore.common.config import CfgNode

from cascade_det.config.backbone_arguments import (
    BACKBONES,
    backbone_arguments,
    backbone_maps,
    trunk_maps,
)
from cascade_det.config.cascade_checks import Check, check_exits_unused
from cascade_det.config.tree import value_of

_GROUP_NORM_GROUPS = 32
_HEAD_WIDTH = 32  # of HierViT
_PATCH_SIZES = [4, 8, 16, 32]
_NECKS = {neck for _, neck in BACKBONES.values()}
_DECODER_CHANNELS = 16  # or more


def _check_box_heads(cfg: CfgNode) -> Iterator[str]:
    own, shared = cfg.MODEL.CASCADE.BOX_HEAD, cfg.MODEL.ROI_BOX_HEAD
    convs, fcs = (own[key] or (shared[key],) for key in ("NUM_CONV", "NUM_FC"))
    stages = zip(itertools.cycle(convs), itertools.cycle(fcs), cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
    for stage, (num_conv, num_fc, _) in enumerate(stages):
        if num_conv + num_fc == 0:
            yield (
                f"MODEL.ROI_BOX_HEAD.NUM_CONV and NUM_FC are both 0 at stage {stage} (or the keys "
                "of the same name under MODEL.CASCADE.BOX_HEAD). Give the head at least one layer."
            )


def _check_resnet(cfg: CfgNode) -> Iterator[str]:
    resnets = cfg.MODEL.RESNETS
    is_small = resnets.DEPTH in (18, 34)
    channels, wanted = resnets.RES2_OUT_CHANNELS, 64 if is_small else 256
    if channels != wanted:
        yield (
            f"MODEL.RESNETS.RES2_OUT_CHANNELS is {channels}, but depth {resnets.DEPTH} has "
            f"{wanted}. Set it to {wanted}."
        )
    if is_small and resnets.NUM_GROUPS != 1:
        yield (
            f"MODEL.RESNETS.NUM_GROUPS is {resnets.NUM_GROUPS}, but depth {resnets.DEPTH} has no "
            "groups. Set it to 1, or take depth 50 or more."
        )


def _check_resnet_maps(cfg: CfgNode) -> Iterator[str]:
    outputs = cfg.MODEL.RESNETS.OUT_FEATURES
    missing = [name for name in cfg.MODEL.FPN.IN_FEATURES if name not in outputs]
    if BACKBONES[cfg.MODEL.BACKBONE.NAME][0] == "resnet" and missing:
        yield (
            f"MODEL.RESNETS.OUT_FEATURES is {outputs}, but MODEL.FPN.IN_FEATURES needs "
            f"{', '.join(missing)}. Add it."
        )


def _check_hiervit(cfg: CfgNode) -> Iterator[str]:
    keys = cfg.MODEL.HIERVIT
    if BACKBONES[cfg.MODEL.BACKBONE.NAME][0] != "hiervit":
        return
    sizes = list(keys.PATCH_SIZES)
    start = _PATCH_SIZES.index(sizes[0]) if sizes[0] in _PATCH_SIZES else 0
    if sizes != _PATCH_SIZES[start : start + len(sizes)]:
        yield (
            f"MODEL.HIERVIT.PATCH_SIZES is {sizes}. Give neighbours out of {_PATCH_SIZES}, "
            "smallest first."
        )
    for key in ("WIDTHS", "DEPTHS"):
        if len(keys[key]) != len(sizes):
            yield (
                f"MODEL.HIERVIT.{key} is {list(keys[key])}, but PATCH_SIZES has {len(sizes)} "
                "stages. Give one value for each."
            )
    if any(width % _HEAD_WIDTH for width in keys.WIDTHS):
        yield (
            f"MODEL.HIERVIT.WIDTHS is {list(keys.WIDTHS)}. Give multiples of {_HEAD_WIDTH}, the "
            "width of a head."
        )


def _check_efficientvit(cfg: CfgNode) -> Iterator[str]:
    kernels = cfg.MODEL.EFFICIENTVIT.KERNELS
    if BACKBONES[cfg.MODEL.BACKBONE.NAME][0] == "efficientvit" and len(kernels) not in (0, 4):
        yield (
            f"MODEL.EFFICIENTVIT.KERNELS is {list(kernels)}. Give 4 kernels, one per head, or () "
            "for the model's own."
        )


def _check_cascade_fpn(cfg: CfgNode) -> Iterator[str]:
    model = cfg.MODEL
    name, fpn = model.BACKBONE.NAME, model.FPN
    trunk, neck = BACKBONES[name]
    if neck != "cascade_fpn":
        return
    for key, wanted in (("NORM", ""), ("FUSE_TYPE", "sum")):
        if fpn[key] != wanted:
            yield (
                f"MODEL.FPN.{key} is {fpn[key]!r}, but {name} does not read it: the CASCADE "
                f"decoder has batch norms and attention gates. Set it to {wanted!r}, or take "
                f"build_{trunk}_fpn_backbone."
            )
    if fpn.OUT_CHANNELS < _DECODER_CHANNELS:
        yield (
            f"MODEL.FPN.OUT_CHANNELS is {fpn.OUT_CHANNELS}, too few for the CASCADE decoder of "
            f"{name}. Give {_DECODER_CHANNELS} or more."
        )
    if len(fpn.IN_FEATURES) == 1:
        yield (
            f"MODEL.FPN.IN_FEATURES is {list(fpn.IN_FEATURES)}. Give two levels or more, which "
            f"the CASCADE decoder of {name} takes."
        )
    if trunk == "efficientvit" and model.EFFICIENTVIT.NECK != "fpn":
        yield (
            f"MODEL.EFFICIENTVIT.NECK is {model.EFFICIENTVIT.NECK!r}, but {name} has the CASCADE "
            f"decoder. Set it to 'fpn', or take build_{trunk}_fpn_backbone."
        )


def takes_tiles(cfg: CfgNode) -> bool:
    """Whether pyramid and RPN can have a tile gate."""
    return cfg.MODEL.BACKBONE.NAME in BACKBONES and not list(_no_tiles(cfg))


def _check_tiles(cfg: CfgNode) -> Iterator[str]:
    exit_ = cfg.MODEL.CASCADE.EXIT
    if not exit_.ENABLED:
        return
    if exit_.TILE_THRESHOLD:
        asking = f"MODEL.CASCADE.EXIT.TILE_THRESHOLD is {exit_.TILE_THRESHOLD}"
        remedy = "Set the threshold to 0 for the whole map."
    elif "tile_head" in exit_.LEARNED:
        asking = "MODEL.CASCADE.EXIT.LEARNED has 'tile_head'"
        remedy = "Leave that part out."
    else:
        return
    for key, wanted in _no_tiles(cfg):
        yield (
            f"{key} is {value_of(cfg, key)!r}, but {asking}: tiles of the finest map need "
            f"{wanted}. {remedy}"
        )


def _no_tiles(cfg: CfgNode) -> Iterator[tuple[str, str]]:
    """Keys that keep the finest map from being computed in tiles, and what it takes instead."""
    model = cfg.MODEL
    finest = model.FPN.IN_FEATURES[0].replace("res", "p") if model.FPN.IN_FEATURES else ""
    problems = {
        "MODEL.BACKBONE.NAME": (
            BACKBONES[model.BACKBONE.NAME][1] != "fpn",
            "a backbone with an FPN, such as build_resnet_fpn_backbone",
        ),
        "MODEL.FPN.NORM": (model.FPN.NORM == "GN", "another norm, or none"),
        # Images are padded to cells of the coarsest, which are then tiles of the finest.
        "MODEL.FPN.IN_FEATURES": (len(model.FPN.IN_FEATURES) < 4, "four levels"),
        "MODEL.RPN.IN_FEATURES": (
            [*model.RPN.IN_FEATURES][:1] != [finest] or len(model.RPN.IN_FEATURES) < 2,
            f"{finest} and the next level, or more",
        ),
        "MODEL.RPN.CONV_DIMS": (len(model.RPN.CONV_DIMS) != 1, "one convolution"),
        "MODEL.ROI_HEADS.IN_FEATURES": (
            [*model.ROI_HEADS.IN_FEATURES][:1] != [finest],
            f"a list that begins with {finest}",
        ),
        "MODEL.CASCADE.FAST.COMPILE": (
            model.CASCADE.FAST.ENABLED and model.CASCADE.FAST.COMPILE,
            "False",
        ),
    }
    for key, (is_wrong, wanted) in problems.items():
        if is_wrong:
            yield key, wanted


def _check_pyramid(cfg: CfgNode) -> Iterator[str]:
    inputs = tuple(cfg.MODEL.FPN.IN_FEATURES)
    if not inputs:  # told for an unknown backbone, too
        yield (
            "MODEL.FPN.IN_FEATURES is []. Give neighbouring levels up to the coarsest of the "
            "backbone, such as ['res2', 'res3', 'res4', 'res5']."
        )
        return
    if any(_check_hiervit(cfg)):
        return
    known, neck = trunk_maps(cfg), backbone_arguments(cfg)["neck"]
    if neck not in _NECKS and inputs != known:
        yield (
            f"MODEL.FPN.IN_FEATURES is {list(inputs)}. Give {list(known)}, which "
            f"EFFICIENTVIT.NECK {neck!r} takes, or set that to 'fpn'."
        )
    elif inputs != known[-len(inputs) :]:
        yield (
            f"MODEL.FPN.IN_FEATURES is {list(inputs)}. Give neighbouring levels up to the "
            f"coarsest, such as {list(known)}."
        )


def _check_levels(cfg: CfgNode) -> Iterator[str]:
    if any(_check_hiervit(cfg)) or any(_check_pyramid(cfg)):
        return
    outputs = list(backbone_maps(cfg))
    for key in ("MODEL.RPN.IN_FEATURES", "MODEL.ROI_HEADS.IN_FEATURES"):
        names = list(value_of(cfg, key))
        start = outputs.index(names[0]) if names and names[0] in outputs else 0
        if not names or names != outputs[start : start + len(names)]:
            yield f"{key} is {names}. Give neighbouring levels, finest first, out of {outputs}."


def _check_anchors(cfg: CfgNode) -> Iterator[str]:
    anchors, levels = cfg.MODEL.ANCHOR_GENERATOR, len(cfg.MODEL.RPN.IN_FEATURES)
    good = True
    for key in ("SIZES", "ASPECT_RATIOS"):
        if len(anchors[key]) not in (1, levels):
            good = False
            yield (
                f"MODEL.ANCHOR_GENERATOR.{key} is {anchors[key]}, with {len(anchors[key])} lists. "
                f"Give 1 list, or {levels}: one for each level of MODEL.RPN.IN_FEATURES."
            )
    if not good:
        return
    per_level = zip(
        itertools.cycle(anchors.SIZES), itertools.cycle(anchors.ASPECT_RATIOS), range(levels)
    )
    counts = [len(sizes) * len(ratios) for sizes, ratios, _ in per_level]
    if len(set(counts)) > 1:
        yield (
            f"MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS make {counts} anchors per position on "
            "the levels, but one RPN head serves them all. Give every level the same number."
        )


def _check_group_norm(cfg: CfgNode) -> Iterator[str]:
    model = cfg.MODEL
    widths: list[tuple[str, int]] = []
    trunk, neck = BACKBONES[model.BACKBONE.NAME]
    if model.RESNETS.NORM == "GN" and trunk.startswith("mobilenet"):
        yield (
            f"MODEL.RESNETS.NORM is GN, but the layers of {model.BACKBONE.NAME} are too narrow for "
            f"{_GROUP_NORM_GROUPS} groups. Take BN, SyncBN or FrozenBN."
        )
    if model.RESNETS.NORM == "GN" and model.RESNETS.DEPTH >= 50 and trunk == "resnet":
        width = model.RESNETS.WIDTH_PER_GROUP * model.RESNETS.NUM_GROUPS
        widths.append(("MODEL.RESNETS.WIDTH_PER_GROUP x NUM_GROUPS", width))
    if model.FPN.NORM == "GN" and neck == "fpn":
        widths.append(("MODEL.FPN.OUT_CHANNELS", model.FPN.OUT_CHANNELS))
    if "GN" in (model.ROI_BOX_HEAD.NORM, *model.CASCADE.BOX_HEAD.NORM):
        widths.append(("MODEL.ROI_BOX_HEAD.CONV_DIM", model.ROI_BOX_HEAD.CONV_DIM))
        own = model.CASCADE.BOX_HEAD.CONV_DIM
        widths += [("MODEL.CASCADE.BOX_HEAD.CONV_DIM", width) for width in own]
    if model.MASK_ON and model.ROI_MASK_HEAD.NUM_CONV and model.ROI_MASK_HEAD.NORM == "GN":
        widths.append(("MODEL.ROI_MASK_HEAD.CONV_DIM", model.ROI_MASK_HEAD.CONV_DIM))
    for key, width in widths:
        if width % _GROUP_NORM_GROUPS:
            yield (
                f"{key} is {width}, but norm GN splits the channels into {_GROUP_NORM_GROUPS} "
                f"groups. Give a multiple of {_GROUP_NORM_GROUPS}, or another norm."
            )


BACKBONE_CHECKS: tuple[Check, ...] = (
    _check_resnet_maps,
    _check_efficientvit,
    _check_hiervit,
    _check_cascade_fpn,
    _check_pyramid,
)
MODEL_CHECKS: tuple[Check, ...] = (
    _check_box_heads,
    check_exits_unused,
    _check_resnet,
    *BACKBONE_CHECKS,
    _check_tiles,
    _check_levels,
    _check_anchors,
    _check_group_norm,
)

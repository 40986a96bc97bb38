"""Builds a detector from a configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from fvcore.common.config import CfgNode
from torch import nn

from cascade_det import config
from cascade_det.backbones import (
    FPN,
    CascadeFPN,
    EfficientViT,
    EfficientViTFPN,
    HATNet,
    HierarchicalViT,
    MaxViT,
    MobileNetV2,
    MobileNetV3Large,
    PVTv2,
    ResNet,
)
from cascade_det.backbones.trunk import Trunk
from cascade_det.core import (
    BoxPredictor,
    CascadeHead,
    ConvFCBoxHead,
    ConvUpsampleMaskHead,
    MaskBranch,
    MaskRules,
    RoIPooler,
    build_exits,
    build_training_schedule,
)
from cascade_det.engine.devices import resolve_device
from cascade_det.standalone.detector import Detector
from cascade_det.standalone.rpn import RPN

TRUNKS: dict[str, Callable[..., Trunk]] = {
    "resnet": ResNet,
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v3_large": MobileNetV3Large,
    "efficientvit": EfficientViT,
    "hatnet": HATNet,
    "hiervit": HierarchicalViT,
    "pvtv2": PVTv2,
    "maxvit": MaxViT,
}


def build_detector(cfg: CfgNode) -> Detector:
    """The detector that a configuration describes, on its device, with initial weights.

    Args:
        cfg: a configuration with our nodes, see ``cascade_det.config.get_cfg``.

    Raises:
        ConfigError: keys contradict each other, or name a part that this host lacks or a GPU that
            does not exist.
    """
    config.require_detector(cfg)
    config.check_config(cfg)
    backbone = build_backbone(cfg)
    rpn_arguments = config.rpn_arguments(cfg)
    rpn = RPN(
        in_channels=backbone.out_channels,
        strides=[backbone.strides[name] for name in rpn_arguments["in_features"]],
        **rpn_arguments,
    )
    pooler_arguments = config.pooler_arguments(cfg)
    roi_in_features = pooler_arguments.pop("in_features")
    detector = Detector(
        backbone=backbone,
        proposal_generator=rpn,
        roi_heads=_build_cascade(
            cfg,
            RoIPooler(
                strides=tuple(backbone.strides[name] for name in roi_in_features),
                **pooler_arguments,
            ),
            backbone.out_channels,
        ),
        roi_in_features=roi_in_features,
        **config.detector_arguments(cfg),
    )
    device = resolve_device(cfg)
    if device.index is not None:
        # PyTorch draws random numbers and reports memory on the current GPU.
        torch.cuda.set_device(device)
    return detector.to(device)


def build_trunk(cfg: CfgNode, out_features: Sequence[str], scale: int = 0) -> Trunk:
    """The backbone of a checked configuration without its pyramid.

    Args:
        cfg: the configuration.
        out_features: names of its maps, finest first.
        scale: 0 or 1, of a segmenter with two scales.
    """
    arguments = config.backbone_arguments(cfg, scale)
    return TRUNKS[arguments["name"]](out_features=tuple(out_features), **arguments["bottom_up"])


def build_backbone(cfg: CfgNode) -> FPN | CascadeFPN | EfficientViTFPN:
    """The backbone of a checked configuration, with its pyramid."""
    arguments = config.backbone_arguments(cfg)
    neck = dict(arguments["fpn"])
    trunk = build_trunk(cfg, neck.pop("in_features"))
    if arguments["neck"] == "fpn":
        return FPN(trunk, **neck)
    if arguments["neck"] == "cascade_fpn":
        return CascadeFPN(trunk, **neck)
    return EfficientViTFPN(trunk, kind=arguments["neck"], **neck)


def _build_cascade(cfg: CfgNode, pooler: RoIPooler, in_channels: int) -> CascadeHead:
    arguments = config.cascade_arguments(cfg)
    heads = [
        ConvFCBoxHead(in_channels=in_channels, pooled_size=pooler.output_size, **head)
        for head in config.box_head_arguments(cfg)
    ]
    agnostic = arguments.pop("cls_agnostic_bbox_reg")
    predictors = [
        BoxPredictor(
            in_features=head.out_features,
            num_classes=arguments["num_classes"],
            cls_agnostic_bbox_reg=agnostic,
        )
        for head in heads
    ]
    exits = build_exits(
        config.exit_arguments(cfg),
        [head.out_features for head in heads],
        in_channels,
        config.rpn_channels(cfg),
    )
    return CascadeHead(
        pooler=pooler,
        box_heads=heads,
        box_predictors=predictors,
        exits=exits,
        regime=build_training_schedule(**config.training_arguments(cfg)),
        masks=_build_masks(cfg, pooler.strides, in_channels),
        **arguments,
    )


def _build_masks(cfg: CfgNode, strides: tuple[int, ...], in_channels: int) -> MaskBranch | None:
    arguments = config.mask_head_arguments(cfg)
    if arguments is None:
        return None

    def build_head() -> nn.Module:
        return ConvUpsampleMaskHead(in_channels=in_channels, **arguments["layers"])

    return MaskBranch(
        nn.ModuleList(build_head() for _ in cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
        if arguments["per_stage"]
        else build_head(),
        RoIPooler(strides=strides, **arguments["pooler"]),
        MaskRules(**arguments["rules"]),
    )

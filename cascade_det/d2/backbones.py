"""Our trunks and pyramids as backbones of Detectron2, registered by name.

They read ``MODEL.BACKBONE``, ``MODEL.FPN`` and the node of their trunk: ``MODEL.RESNETS.NORM`` for
MobileNets, ``MODEL.EFFICIENTVIT``, ``MODEL.HATNET`` or ``MODEL.HIERVIT``. ResNets are Detectron2's.
"""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone import build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from cascade_det import backbones, config
from cascade_det.backbones import (
    CascadeFPN,
    EfficientViT,
    EfficientViTFPN,
    HATNet,
    HierarchicalViT,
    MobileNetV2,
    MobileNetV3Large,
    PVTv2,
)
from cascade_det.backbones.fpn import StridedLevels
from cascade_det.backbones.trunk import LEVELS
from cascade_det.config.tree import add_model_nodes
from cascade_det.d2.parts import refuse_classifier_names


class _Trunk(Backbone):
    channels: dict[str, int]

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every feature."""
        return {
            name: ShapeSpec(channels=width, stride=2 ** LEVELS[name])
            for name, width in self.channels.items()
        }


class MobileNetV2Backbone(MobileNetV2, _Trunk):
    """:class:`~cascade_det.backbones.MobileNetV2` as a ``Backbone`` of Detectron2."""


class MobileNetV3LargeBackbone(MobileNetV3Large, _Trunk):
    """:class:`~cascade_det.backbones.MobileNetV3Large` as a ``Backbone`` of Detectron2."""


class EfficientViTBackbone(EfficientViT, _Trunk):
    """:class:`~cascade_det.backbones.EfficientViT` as a ``Backbone`` of Detectron2."""


class HATNetBackbone(HATNet, _Trunk):
    """:class:`~cascade_det.backbones.HATNet` as a ``Backbone`` of Detectron2."""


class HierarchicalViTBackbone(HierarchicalViT, _Trunk):
    """:class:`~cascade_det.backbones.HierarchicalViT` as a ``Backbone`` of Detectron2."""


class PVTv2Backbone(PVTv2, _Trunk):
    """:class:`~cascade_det.backbones.PVTv2` as a ``Backbone`` of Detectron2."""


class _Pyramid(Backbone):
    out_channels: int
    strides: dict[str, int]

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every map."""
        return {
            name: ShapeSpec(channels=self.out_channels, stride=stride)
            for name, stride in self.strides.items()
        }


class FPNBackbone(backbones.FPN, _Pyramid):
    """:class:`~cascade_det.backbones.FPN` as a ``Backbone`` of Detectron2, for inference."""


class CascadeFPNBackbone(CascadeFPN, _Pyramid):
    """:class:`~cascade_det.backbones.CascadeFPN` as a ``Backbone`` of Detectron2."""


class EfficientViTFPNBackbone(EfficientViTFPN, _Pyramid):
    """:class:`~cascade_det.backbones.EfficientViTFPN` as a ``Backbone`` of Detectron2."""


@BACKBONE_REGISTRY.register()
def build_mobilenet_v2_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """MobileNetV2 with a feature pyramid."""
    return _build(cfg, MobileNetV2Backbone)


@BACKBONE_REGISTRY.register()
def build_mobilenet_v3_large_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """MobileNetV3-Large with a feature pyramid."""
    return _build(cfg, MobileNetV3LargeBackbone)


@BACKBONE_REGISTRY.register()
def build_efficientvit_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """EfficientViT with a feature pyramid, or with a published neck."""
    return _build(cfg, EfficientViTBackbone)


@BACKBONE_REGISTRY.register()
def build_hatnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """HAT-Net with a feature pyramid."""
    return _build(cfg, HATNetBackbone)


@BACKBONE_REGISTRY.register()
def build_hiervit_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """The hierarchical ViT with a feature pyramid."""
    return _build(cfg, HierarchicalViTBackbone)


@BACKBONE_REGISTRY.register()
def build_mobilenet_v2_cascade_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """MobileNetV2 with the CASCADE decoder."""
    return _build(cfg, MobileNetV2Backbone)


@BACKBONE_REGISTRY.register()
def build_mobilenet_v3_large_cascade_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """MobileNetV3-Large with the CASCADE decoder."""
    return _build(cfg, MobileNetV3LargeBackbone)


@BACKBONE_REGISTRY.register()
def build_efficientvit_cascade_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """EfficientViT with the CASCADE decoder."""
    return _build(cfg, EfficientViTBackbone)


@BACKBONE_REGISTRY.register()
def build_hatnet_cascade_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """HAT-Net with the CASCADE decoder."""
    return _build(cfg, HATNetBackbone)


@BACKBONE_REGISTRY.register()
def build_hiervit_cascade_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """The hierarchical ViT with the CASCADE decoder."""
    return _build(cfg, HierarchicalViTBackbone)


@BACKBONE_REGISTRY.register()
def build_resnet_cascade_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Detectron2's ResNet with the CASCADE decoder."""
    fpn = backbone_arguments(cfg)["fpn"]
    resnet = build_resnet_backbone(cfg, input_shape)
    resnet.register_load_state_dict_post_hook(refuse_classifier_names)
    # What a pyramid of ours asks of a trunk.
    resnet.out_features = fpn.pop("in_features")
    resnet.channels = {name: spec.channels for name, spec in resnet.output_shape().items()}
    return CascadeFPNBackbone(resnet, **fpn)


def backbone_arguments(cfg: CfgNode) -> dict[str, Any]:
    """As ``config.backbone_arguments``, of a checked copy with our nodes."""
    cfg = cfg.clone()
    cfg.defrost()
    add_model_nodes(cfg)  # where the heads are Detectron2's, its configuration may lack our nodes
    config.check_backbone(cfg)
    return config.backbone_arguments(cfg)


def _build(cfg: CfgNode, trunk: type[_Trunk]) -> Backbone:
    arguments = backbone_arguments(cfg)
    fpn = arguments["fpn"]
    in_features = fpn.pop("in_features")
    bottom_up = trunk(out_features=in_features, **arguments["bottom_up"])
    # Here as well, since the ROI heads may be Detectron2's.
    bottom_up.register_load_state_dict_post_hook(refuse_classifier_names)
    if arguments["neck"] == "cascade_fpn":
        return CascadeFPNBackbone(bottom_up, **fpn)
    if arguments["neck"] != "fpn":
        return EfficientViTFPNBackbone(bottom_up, kind=arguments["neck"], **fpn)
    if extra := fpn.pop("extra_convs", 0):
        top_block = StridedLevels(bottom_up, out_channels=fpn["out_channels"], num_levels=extra)
    else:
        top_block = LastLevelMaxPool()
        top_block.in_feature = in_features[-1].replace("res", "p")
    return FPN(bottom_up=bottom_up, in_features=in_features, top_block=top_block, **fpn)

"""Our trunks without a pyramid as backbones of Detectron2's segmenters, registered by name.

They have the maps that ``MODEL.SEM_SEG_HEAD.IN_FEATURES`` names, and otherwise read the keys that
they read with a pyramid. Detectron2 has a ResNet of its own, ``build_resnet_backbone``.
"""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

from cascade_det.d2.backbones import (
    EfficientViTBackbone,
    HATNetBackbone,
    HierarchicalViTBackbone,
    MobileNetV2Backbone,
    MobileNetV3LargeBackbone,
    PVTv2Backbone,
    backbone_arguments,
)
from cascade_det.d2.parts import refuse_classifier_names

TRUNKS = {
    "mobilenet_v2": MobileNetV2Backbone,
    "mobilenet_v3_large": MobileNetV3LargeBackbone,
    "efficientvit": EfficientViTBackbone,
    "hatnet": HATNetBackbone,
    "hiervit": HierarchicalViTBackbone,
    "pvtv2": PVTv2Backbone,
}


def _register(name: str) -> None:
    def build(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
        arguments = backbone_arguments(cfg)["bottom_up"]
        trunk = TRUNKS[name](out_features=tuple(cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES), **arguments)
        trunk.register_load_state_dict_post_hook(refuse_classifier_names)
        return trunk

    build.__name__ = f"build_{name}_backbone"
    BACKBONE_REGISTRY.register(build)


for _name in TRUNKS:
    _register(_name)

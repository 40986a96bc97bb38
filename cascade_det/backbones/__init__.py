"""Feature extractors and feature pyramids, under Detectron2's or their official names."""

from cascade_det.backbones.cascade_fpn import CascadeFPN
from cascade_det.backbones.efficientvit import EfficientViT
from cascade_det.backbones.efficientvit_neck import EfficientViTFPN
from cascade_det.backbones.fpn import FPN
from cascade_det.backbones.hatnet import HATNet
from cascade_det.backbones.hierarchical_vit import HierarchicalViT
from cascade_det.backbones.maxvit import MaxViT
from cascade_det.backbones.mobilenet import MobileNetV2, MobileNetV3Large
from cascade_det.backbones.pvtv2 import PVTv2
from cascade_det.backbones.resnet import ResNet

__all__ = [
    "FPN",
    "CascadeFPN",
    "EfficientViT",
    "EfficientViTFPN",
    "HATNet",
    "HierarchicalViT",
    "MaxViT",
    "MobileNetV2",
    "MobileNetV3Large",
    "PVTv2",
    "ResNet",
]

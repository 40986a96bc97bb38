"""Feature extractors and the feature pyramid, under Detectron2's names."""

from cascade_det.backbones.fpn import FPN
from cascade_det.backbones.mobilenet import MobileNetV2, MobileNetV3Large
from cascade_det.backbones.resnet import ResNet

__all__ = ["FPN", "MobileNetV2", "MobileNetV3Large", "ResNet"]

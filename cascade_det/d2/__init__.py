"""The cascade as a plugin of Detectron2: importing this registers its ROI heads and backbones.

``add_cascade_config(cfg)`` adds the keys of ``MODEL.CASCADE`` and ``CASCADE`` to a configuration of
Detectron2's; ``MODEL.ROI_HEADS.NAME: EarlyExitCascadeROIHeads`` puts the heads into a model.
"""

from cascade_det.config import add_cascade_config
from cascade_det.d2.backbones import (
    build_mobilenet_v2_fpn_backbone,
    build_mobilenet_v3_large_fpn_backbone,
)
from cascade_det.d2.roi_heads import EarlyExitCascadeROIHeads

__all__ = [
    "EarlyExitCascadeROIHeads",
    "add_cascade_config",
    "build_mobilenet_v2_fpn_backbone",
    "build_mobilenet_v3_large_fpn_backbone",
]

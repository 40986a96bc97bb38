"""The cascade as a plugin of Detectron2. Importing it registers our heads and backbones.

``add_cascade_config(cfg)`` adds ``CASCADE`` and our nodes below ``MODEL`` to a configuration of
Detectron2; ``MODEL.ROI_HEADS.NAME: EarlyExitCascadeROIHeads`` selects the cascade, and
``MODEL.SEM_SEG_HEAD.NAME: CascadeSemSegHead`` the decoder. ``optimize(model)`` makes a detector
fast for inference.
"""

from cascade_det.quiet_imports import without_jit_warning

try:
    with without_jit_warning():
        import detectron2.engine
        import detectron2.modeling  # noqa: F401
except ImportError as error:
    raise type(error)(
        f"cascade_det.d2 is a plugin of Detectron2, which cannot be imported here ({error}). "
        "Install it into this environment, see "
        "https://detectron2.readthedocs.io/en/latest/tutorials/install.html, or use "
        "cascade_det.standalone, which does not need it.",
        name=error.name,
        path=error.path,
    ) from error

import cascade_det.d2.trunks  # noqa: F401
from cascade_det.config import add_cascade_config
from cascade_det.d2.backbones import (
    build_efficientvit_fpn_backbone,
    build_hatnet_fpn_backbone,
    build_hiervit_fpn_backbone,
    build_mobilenet_v2_fpn_backbone,
    build_mobilenet_v3_large_fpn_backbone,
)
from cascade_det.d2.optimize import optimize
from cascade_det.d2.roi_heads import EarlyExitCascadeROIHeads
from cascade_det.d2.sem_seg_head import CascadeSemSegHead

__all__ = [
    "CascadeSemSegHead",
    "EarlyExitCascadeROIHeads",
    "add_cascade_config",
    "build_efficientvit_fpn_backbone",
    "build_hatnet_fpn_backbone",
    "build_hiervit_fpn_backbone",
    "build_mobilenet_v2_fpn_backbone",
    "build_mobilenet_v3_large_fpn_backbone",
    "optimize",
]

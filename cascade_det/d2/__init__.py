"""The cascade as a plugin of Detectron2. Importing it registers our ROI heads and backbones.

``add_cascade_config(cfg)`` adds ``MODEL.CASCADE``, ``CASCADE`` and the nodes of our backbones to a
configuration of Detectron2; ``MODEL.ROI_HEADS.NAME: EarlyExitCascadeROIHeads`` selects the heads.
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

from cascade_det.config import add_cascade_config
from cascade_det.d2.backbones import (
    build_efficientvit_fpn_backbone,
    build_hatnet_fpn_backbone,
    build_hiervit_fpn_backbone,
    build_mobilenet_v2_fpn_backbone,
    build_mobilenet_v3_large_fpn_backbone,
)
from cascade_det.d2.roi_heads import EarlyExitCascadeROIHeads

__all__ = [
    "EarlyExitCascadeROIHeads",
    "add_cascade_config",
    "build_efficientvit_fpn_backbone",
    "build_hatnet_fpn_backbone",
    "build_hiervit_fpn_backbone",
    "build_mobilenet_v2_fpn_backbone",
    "build_mobilenet_v3_large_fpn_backbone",
]

"""Builds a semantic segmenter from a configuration."""

from __future__ import annotations

from typing import Any

from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.backbones import FPN, CascadeFPN, EfficientViTFPN
from cascade_det.backbones.trunk import LEVELS, Trunk
from cascade_det.config.backbone_arguments import TRUNKS
from cascade_det.engine.devices import resolve_device
from cascade_det.segmentation.head import SegmentationHead
from cascade_det.segmentation.losses import SubsetLoss
from cascade_det.standalone.build import build_backbone, build_trunk
from cascade_det.standalone.segmenter import SemanticSegmentor


def build_segmenter(cfg: CfgNode) -> SemanticSegmentor:
    """The segmenter that a configuration describes, on its device, with initial weights.

    Args:
        cfg: a configuration with our nodes and ``MODEL.META_ARCHITECTURE SemanticSegmentor``.

    Raises:
        ConfigError: keys contradict each other, or name a part that this host lacks or a GPU that
            does not exist.
    """
    config.check_config(cfg)
    arguments = config.segmenter_arguments(cfg)
    names = arguments["in_features"]
    if cfg.MODEL.BACKBONE.NAME in TRUNKS:
        backbone: dict[str, Any] = _of_trunk(build_trunk(cfg, names), names)
    else:
        backbone = _of_pyramid(build_backbone(cfg), names)
    channels = backbone.pop("channels")
    segmenter = SemanticSegmentor(
        sem_seg_head=SegmentationHead(channels[::-1], **arguments["head"]),
        in_features=names,
        loss=SubsetLoss(**arguments["loss"]),
        loss_weight=arguments["loss_weight"],
        **backbone,
        **config.detector_arguments(cfg),
    )
    return segmenter.to(resolve_device(cfg))


def _of_trunk(trunk: Trunk, names: tuple[str, ...]) -> dict[str, Any]:
    return {
        "backbone": trunk,
        "stride": 2 ** LEVELS[names[0]],
        "size_divisibility": 1,
        "channels": [trunk.channels[name] for name in names],
    }


def _of_pyramid(
    pyramid: FPN | CascadeFPN | EfficientViTFPN, names: tuple[str, ...]
) -> dict[str, Any]:
    pyramid.freeze_unread(names)
    return {
        "backbone": pyramid,
        "stride": pyramid.strides[names[0]],
        "size_divisibility": pyramid.size_divisibility,
        "channels": [pyramid.out_channels] * len(names),
    }

"""Builds a semantic segmenter from a configuration."""

from __future__ import annotations

from typing import Any

from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.backbones import FPN, CascadeFPN, EfficientViTFPN
from cascade_det.backbones.cascade_decoder import CascadeDecoder
from cascade_det.backbones.trunk import LEVELS, Trunk
from cascade_det.config.backbone_arguments import TRUNKS
from cascade_det.engine.devices import resolve_device
from cascade_det.segmentation.dual_scale import DualScaleNetwork
from cascade_det.segmentation.head import SegmentationHead
from cascade_det.segmentation.losses import SubsetLoss
from cascade_det.standalone.build import build_backbone, build_trunk
from cascade_det.standalone.dual_scale_segmenter import DualScaleSegmentor
from cascade_det.standalone.segmenter import SemanticSegmentor
from cascade_det.standalone.segmenter_base import SegmenterBase


def build_segmenter(cfg: CfgNode) -> SegmenterBase:
    """The segmenter that a configuration describes, on its device, with initial weights.

    Args:
        cfg: a configuration with our nodes and ``MODEL.META_ARCHITECTURE SemanticSegmentor``.

    Raises:
        ConfigError: keys contradict each other, or name a part that this host lacks or a GPU that
            does not exist.
    """
    config.check_config(cfg)
    arguments = config.segmenter_arguments(cfg)
    build = _build_one_scale if arguments["dual_scale"] is None else _build_two_scales
    shared = {
        "loss": SubsetLoss(**arguments["loss"]),
        "loss_weight": arguments["loss_weight"],
        **config.detector_arguments(cfg),
    }
    return build(cfg, arguments, shared).to(resolve_device(cfg))


def build_one_scale(cfg: CfgNode) -> SemanticSegmentor:
    """As ``build_segmenter``.

    Raises:
        ConfigError: it would have two scales.
    """
    config.require_one_scale(cfg)
    segmenter = build_segmenter(cfg)
    assert isinstance(segmenter, SemanticSegmentor)
    return segmenter


def _build_one_scale(
    cfg: CfgNode, arguments: dict[str, Any], shared: dict[str, Any]
) -> SegmenterBase:
    names = arguments["in_features"]
    if cfg.MODEL.BACKBONE.NAME in TRUNKS:
        backbone: dict[str, Any] = _of_trunk(build_trunk(cfg, names), names)
    else:
        backbone = _of_pyramid(build_backbone(cfg), names)
    channels = backbone.pop("channels")
    return SemanticSegmentor(
        sem_seg_head=SegmentationHead(channels[::-1], **arguments["head"]),
        in_features=names,
        **backbone,
        **shared,
    )


def _build_two_scales(
    cfg: CfgNode, arguments: dict[str, Any], shared: dict[str, Any]
) -> SegmenterBase:
    names, scales, head = arguments["in_features"], arguments["dual_scale"], arguments["head"]
    first, second = (build_trunk(cfg, names, scale) for scale in (0, 1))
    channels = [first.channels[name] for name in reversed(names)]
    grey, num_classes = scales.pop("grey"), head.pop("num_classes")
    del head["exits"]  # a check refuses them
    network = DualScaleNetwork(
        backbones=(first, second),
        decoder=CascadeDecoder(channels, **head),
        num_classes=num_classes,
        **scales,
    )
    return DualScaleSegmentor(network=network, grey=grey, **shared)


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

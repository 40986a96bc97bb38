"""The box heads of a cascade, built by Detectron2 from a configuration."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, build_box_head

from cascade_det import config
from cascade_det.d2.config_checks import check_box_heads
from cascade_det.d2.parts import common_value


def build_box_heads(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
    """Arguments of ``CascadeROIHeads``; the stages may have different heads.

    Args:
        cfg: a configuration with our keys.
        input_shape: of the feature maps, by name.

    Raises:
        ConfigError: see ``check_box_heads``.
    """
    check_box_heads(cfg, input_shape)
    pooling = config.pooler_arguments(cfg)
    in_features, size = list(pooling["in_features"]), pooling["output_size"]
    channels = common_value(input_shape[name].channels for name in in_features)
    cascade = cfg.MODEL.ROI_BOX_CASCADE_HEAD
    heads, predictors = [], []
    stages = zip(config.box_head_configs(cfg), cascade.BBOX_REG_WEIGHTS, strict=True)
    for stage_cfg, weights in stages:
        head = build_box_head(stage_cfg, ShapeSpec(channels=channels, height=size, width=size))
        transform = Box2BoxTransform(weights=weights)
        heads.append(head)
        predictors.append(
            FastRCNNOutputLayers(stage_cfg, head.output_shape, box2box_transform=transform)
        )
    return {
        "box_in_features": in_features,
        "box_pooler": ROIPooler(
            output_size=size,
            scales=[1.0 / input_shape[name].stride for name in in_features],
            sampling_ratio=pooling["sampling_ratio"],
            pooler_type=cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE,
        ),
        "box_heads": heads,
        "box_predictors": predictors,
        "proposal_matchers": [Matcher([iou], [0, 1]) for iou in cascade.IOUS],
    }


def num_features(shape: ShapeSpec) -> int:
    """How many numbers a box head returns for a region."""
    return (shape.channels or 1) * (shape.height or 1) * (shape.width or 1)

"""Mask heads in Detectron2: one for every stage, and its own as a head of the cascade.

Shapes: R regions, C channels, P bins per side of a crop, K classes, M cells per side of a mask.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from detectron2.structures import Instances
from torch import Tensor, nn

from cascade_det import config
from cascade_det.core import ConvUpsampleMaskHead, MaskBranch, MaskRules
from cascade_det.core.roi_pooling import Pyramid
from cascade_det.core.structures.boxes import flatten_images
from cascade_det.d2.parts import to_roi_pooler


@ROI_MASK_HEAD_REGISTRY.register()
class StageMaskHeads(nn.ModuleList):
    """One mask head per stage, for ``EarlyExitCascadeROIHeads`` alone.

    Each is trained on the foreground of its stage; in inference their probabilities are averaged
    (``MODEL.CASCADE.MASK.STAGES every``). Layers and names are those of Detectron2's
    ``MaskRCNNConvUpsampleHead``, below the number of the stage.

    Args:
        heads: S modules, ``[R, C, P, P]`` and classes ``[R]`` to logits ``[R, M, M]``, such as
            ``cascade_det.core.ConvUpsampleMaskHead``.
    """

    @configurable
    def __init__(self, heads: Iterable[nn.Module]) -> None:
        super().__init__(heads)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Arguments from a configuration with our keys."""
        arguments = config.mask_head_arguments(cfg)
        assert arguments is not None
        layers = arguments["layers"]
        return {
            "heads": [
                ConvUpsampleMaskHead(in_channels=input_shape.channels, **layers)
                for _ in cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS
            ]
        }


class ClassMaskHead(nn.Module):
    """A mask head of Detectron2 as a head of the cascade: the masks of given classes.

    Args:
        head: its ``layers`` give logits ``[R, K, M, M]``, or ``[R, 1, M, M]`` for all classes.
    """

    def __init__(self, head: BaseMaskRCNNHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, pooled: Tensor, classes: Tensor) -> Tensor:
        """``[R, C, P, P]`` and int64 ``[R]`` to logits ``[R, M, M]``."""
        logits = self.head.layers(pooled)
        if logits.shape[1] == 1:
            classes = torch.zeros_like(classes)
        return logits[torch.arange(len(logits), device=logits.device), classes]


def mask_branch(
    head: nn.Module,
    pooler: ROIPooler | None,
    *,
    same_maps: bool,
    num_stages: int,
    kernel: str,
    rules: MaskRules,
) -> MaskBranch | None:
    """The mask heads of a model as the cascade runs them.

    Args:
        head: of the model.
        pooler: crops regions for it; ``None`` for a head that crops by itself.
        same_maps: whether it pools the maps that the box heads pool.
        num_stages: S.
        kernel: see ``MODEL.CASCADE.POOLER_KERNEL``.
        rules: which detections get a mask.

    Returns:
        ``None`` for a head of another kind, which Detectron2 runs.

    Raises:
        ValueError: heads of stages do not fit the cascade, or there are rules for a head of
            another kind.
    """
    if isinstance(head, nn.ModuleList):
        if len(head) != num_stages:
            raise ValueError(f"mask_head has {len(head)} heads for {num_stages} stages")
        if pooler is None or not same_maps:
            raise ValueError("mask heads of stages need a mask_pooler, of the maps of box_pooler")
        return MaskBranch(head, to_roi_pooler(pooler, kernel, "mask_pooler"), rules)
    # An overridden forward may do more than give masks by ``layers``.
    if (
        isinstance(head, BaseMaskRCNNHead)
        and type(head).forward is BaseMaskRCNNHead.forward
        and pooler is not None
        and same_maps
    ):
        try:
            own = to_roi_pooler(pooler, kernel, "mask_pooler")
        except ValueError:
            own = None
        if own is not None:
            return MaskBranch(ClassMaskHead(head), own, rules)
    if rules != MaskRules():
        raise ValueError(
            "MODEL.CASCADE.MASK.SCORE_THRESHOLD and REDUNDANCY leave out masks of "
            "MaskRCNNConvUpsampleHead and heads like it. Leave them at their defaults: Detectron2 "
            f"runs {type(head).__name__}."
        )
    return None


def with_stage_heads(cfg: CfgNode) -> CfgNode:
    """The configuration that makes Detectron2 build the arrangement of ``MASK.STAGES``."""
    if cfg.MODEL.CASCADE.MASK.STAGES == "last":
        return cfg
    return config.changed(cfg, "MODEL.ROI_MASK_HEAD.NAME", StageMaskHeads.__name__)


def add_masks(instances: list[Instances], branch: MaskBranch, pyramid: Pyramid) -> None:
    """Set ``pred_masks`` ``[D, 1, M, M]`` of given boxes and classes; without rules."""
    boxes, image_index = flatten_images([x.pred_boxes.tensor for x in instances])
    classes = torch.cat([x.pred_classes for x in instances])
    masks = branch.probabilities(pyramid, boxes, image_index, classes)  # [D, M, M]
    for own, found in zip(masks.split([len(x) for x in instances]), instances, strict=True):
        found.pred_masks = own[:, None]

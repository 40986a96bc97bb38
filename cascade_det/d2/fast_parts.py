"""Detectron2's backbone and RPN with the forward passes of our own, for inference.

Modules stay the same objects under the same names, with their settings and hooks, and become
instances of our classes, which read the same attributes. Only a feature pyramid is a new object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.layers import Conv2d
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone import resnet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from cascade_det.backbones.fpn import StridedLevels
from cascade_det.backbones.resnet import BottleneckBlock
from cascade_det.backbones.trunk import LEVELS
from cascade_det.core.recorded_tiles import TileProposals, join_proposals
from cascade_det.d2.backbones import CascadeFPNBackbone, EfficientViTFPNBackbone, FPNBackbone
from cascade_det.layers.conv_norm import ConvNorm
from cascade_det.layers.rpn_head import BestAnchors, RPNHead, TileScorer
from cascade_det.layers.tiles import FeatureMap

Pyramid = FPNBackbone | CascadeFPNBackbone | EfficientViTFPNBackbone


def _by_objectness() -> None:
    """No scorer of tiles."""


class LeanRPN(RPN):
    """Detectron2's RPN in inference, with the deltas of its best anchors only.

    Its ``rpn_head`` is an ``RPNHead`` of ours.

    Attributes:
        tile_threshold: gives that of ``RPNHead.best``; ``None`` for a model without a tile gate.
        tile_scorer: gives that of ``RPNHead.best``.
    """

    tile_threshold: Callable[[], float] | None = None
    tile_scorer: Callable[[], TileScorer | None] = staticmethod(_by_objectness)

    @torch.no_grad()
    def forward(
        self,
        images: ImageList,
        features: dict[str, FeatureMap],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Proposals as Detectron2's, and no losses."""
        levels = [features[name] for name in self.in_features]
        most = self.pre_nms_topk[False]
        threshold = 0.0 if self.tile_threshold is None else self.tile_threshold()
        best = self.rpn_head.best(
            levels, most, tile_threshold=threshold, tile_scorer=self.tile_scorer()
        )
        return self._select(best, levels, images), {}

    @torch.no_grad()
    def propose_at(
        self, images: ImageList, features: dict[str, Tensor], thresholds: Sequence[float]
    ) -> tuple[list[Tensor], list[Tensor], TileProposals]:
        """Boxes and objectness of some tile thresholds together, see ``RPNHead.best_at``."""
        levels = [features[name] for name in self.in_features]
        found = self.rpn_head.best_at(
            levels, self.pre_nms_topk[False], thresholds, tile_scorer=self.tile_scorer()
        )
        selected = [self._select(x.best, levels, images) for x in found]
        proposals = [
            ([x.proposal_boxes.tensor for x in own], [x.objectness_logits for x in own])
            for own in selected
        ]
        return join_proposals(proposals, thresholds, [x.opened for x in found])

    def _select(
        self, best: Sequence[BestAnchors], levels: Sequence[FeatureMap], images: ImageList
    ) -> list[Instances]:
        """Proposals among the best anchors of the levels."""
        proposals = []
        for level, anchors in zip(best, self.anchor_generator(levels), strict=True):
            chosen = anchors.tensor[level.anchor_index]  # [N, K, 4]
            boxes = self.box2box_transform.apply_deltas(
                level.deltas.flatten(0, 1), chosen.flatten(0, 1)
            )
            proposals.append(boxes.view_as(chosen))
        found: list[Instances] = find_top_rpn_proposals(
            proposals,
            [level.logits for level in best],
            images.image_sizes,
            self.nms_thresh,
            self.pre_nms_topk[False],
            self.post_nms_topk[False],
            self.min_box_size,
            False,
        )
        return found


class _Bottleneck(resnet.BottleneckBlock):
    forward = BottleneckBlock.forward


def fast_pyramid(backbone: Any) -> Pyramid | None:
    """A backbone with pyramid, of our layers; ``None`` leaves one of unknown parts as it is.

    Known are Detectron2's ResNets and our trunks, below Detectron2's FPN or our pyramids.
    """
    trunk = getattr(backbone, "bottom_up", None)
    if trunk is None or not (_is_plain_resnet(trunk) or hasattr(trunk, "stem_and_stages")):
        return None
    if type(backbone) in (CascadeFPNBackbone, EfficientViTFPNBackbone):
        _use_our_layers(backbone)
        ours: Pyramid = backbone
        return ours
    if type(backbone) is not FPN or not _is_plain_fpn(backbone):
        return None
    _use_our_layers(backbone)
    return _our_fpn(backbone)


def stem_and_stages(trunk: Any) -> tuple[nn.Module, list[nn.Module]]:
    """The layers of a known trunk: the stem, which takes the images, and the others in order."""
    if isinstance(trunk, resnet.ResNet):
        return trunk.stem, list(trunk.stages)
    layers: tuple[nn.Module, list[nn.Module]] = trunk.stem_and_stages()
    return layers


def fast_rpn_head(rpn: Any) -> RPNHead | None:
    """Make an RPN lean, and return its head; ``None`` leaves one of unknown parts as it is."""
    head: Any = getattr(rpn, "rpn_head", None)
    if type(rpn) is not RPN or type(head) is not StandardRPNHead:
        return None
    convs = list(head.conv) if isinstance(head.conv, nn.Sequential) else [head.conv]
    last = head.objectness_logits, head.anchor_deltas
    if (
        any(type(c) is not Conv2d or not isinstance(c.activation, nn.ReLU) for c in convs)
        or any(c.norm is not None for c in convs)
        or last[1].out_channels != 4 * last[0].out_channels
    ):
        return None
    for conv in convs:
        conv.__class__ = ConvNorm
    rpn.__class__, head.__class__ = LeanRPN, RPNHead
    head.topk_deltas_only = True
    ours: RPNHead = head
    return ours


def _is_plain_resnet(trunk: Any) -> bool:
    blocks = (resnet.BasicBlock, resnet.BottleneckBlock)
    return (
        type(trunk) is resnet.ResNet
        and type(trunk.stem) is resnet.BasicStem
        and all(type(block) in blocks for stage in trunk.stages for block in stage)
    )


def _is_plain_fpn(fpn: Any) -> bool:
    """Whether our FPN has the same maps."""
    shapes, top = fpn.bottom_up.output_shape(), fpn.top_block
    if any(LEVELS.get(name) != shapes[name].stride.bit_length() - 1 for name in fpn.in_features):
        return False
    if fpn.padding_constraints.get("square_size", 0):
        return False
    last = fpn.in_features[-1]
    if type(top) is LastLevelMaxPool:
        return bool(top.in_feature == f"p{LEVELS[last]}")
    return type(top) is StridedLevels and top.in_feature == last


def _use_our_layers(backbone: nn.Module) -> None:
    for module in list(backbone.modules()):
        layer: Any = module
        if type(layer) is Conv2d and layer.activation is None:
            layer.__class__ = ConvNorm
        elif type(layer) is resnet.BottleneckBlock:
            layer.__class__ = _Bottleneck


def _our_fpn(theirs: Any) -> FPNBackbone:
    trunk, names = theirs.bottom_up, tuple(theirs.in_features)
    # What our pyramids ask of a trunk.
    trunk.channels = {name: trunk.output_shape()[name].channels for name in names}
    trunk.out_features = names
    with torch.device("meta"):  # without drawing weights
        ours = FPNBackbone(
            trunk, out_channels=theirs.output_convs[0].out_channels, fuse_type=theirs._fuse_type
        )
    for name, conv in theirs.named_children():
        if name.startswith("fpn_"):
            setattr(ours, name, conv)
    if isinstance(theirs.top_block, StridedLevels):
        ours.top_block = theirs.top_block
        top = ours.levels[-1]
        ours.strides |= {f"p{i}": 2**i for i in range(top + 1, top + 1 + ours.top_block.num_levels)}
    return ours.train(theirs.training)


def kind_of(part: nn.Module) -> str:
    """The class of a part, and of its trunk if it has one."""
    trunk = getattr(part, "bottom_up", None)
    name = type(part).__name__
    return name if not isinstance(trunk, Backbone) else f"{name} over {type(trunk).__name__}"

"""torchvision's Faster R-CNN with a ResNet-50 and a feature pyramid."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from cascade_det.benchmark.contenders import Outcome
from cascade_det.benchmark.marks import Marks
from cascade_det.benchmark.setup import Regions, Sample, Setup
from cascade_det.benchmark.weights import keep_anchors, settle_norms, spread
from cascade_det.core import Detections, ExitPolicy


class Torchvision:
    """torchvision's model.

    Args:
        model: in evaluation mode.
        device: of the model.
    """

    def __init__(self, model: FasterRCNN, device: torch.device) -> None:
        self.model: Any = model
        self._device = device
        self._arrived = 0
        self.model.roi_heads.register_forward_pre_hook(self._count)

    def limit_proposals(self, count: int) -> None:
        """Let the RPN hand out so many regions of an image."""
        self.model.rpn._post_nms_top_n["testing"] = count

    def set_exits(self, exits: ExitPolicy | None) -> None:
        """It has none."""

    def inputs(self, batch: Sequence[Sample]) -> list[Tensor]:
        """The batch as the model takes it."""
        # Whoever reads images for torchvision makes floats of them: no work of the model.
        return [(sample["image"].flip(0).float() / 255).to(self._device) for sample in batch]

    def prepare(
        self, batch: Sequence[Sample], regions: Regions, dtype: torch.dtype | None
    ) -> tuple[OrderedDict[str, Tensor], list[Tensor], list[tuple[int, int]]]:
        """Its own features, with given regions."""
        images, _ = self.model.transform(self.inputs(batch))
        return self.model.backbone(images.tensors), regions.boxes, images.image_sizes

    def heads(self, prepared: Any) -> list[dict[str, Tensor]]:
        """The RoI heads alone."""
        return self.model.roi_heads(*prepared)[0]

    def whole(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """The whole model."""
        return self.model(images)

    def outcome(self, returned: list[dict[str, Tensor]]) -> Outcome:
        """What a call returned, in our terms."""
        detections = [
            # Class 0 is its background.
            Detections(x["boxes"], x["scores"], x["labels"] - 1, torch.zeros_like(x["labels"]))
            for x in returned
        ]
        return Outcome(detections, self._arrived, [self._arrived])

    def parts(self, images: list[Tensor]) -> dict[str, float]:
        """Milliseconds of the parts of one call."""
        marks = Marks(self._device)
        model = self.model
        watched = [
            (model.transform, "forward", "preprocess"),
            (model.backbone, "forward", "backbone"),
            (model.rpn, "forward", "rpn"),
            (model.roi_heads, "forward", "stage0"),
            (model.roi_heads, "postprocess_detections", "postprocess"),
        ]
        with marks.watching(watched):
            model(images)
        return marks.milliseconds

    def _count(self, heads: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._arrived = sum(len(proposals) for proposals in inputs[1])


def reason_against(cfg: CfgNode) -> str:
    """Why torchvision's model is no contender of a configuration; empty if it is one."""
    trunk = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RESNETS.DEPTH
    if trunk == ("build_resnet_fpn_backbone", 50):
        return ""
    return "its backbone is ResNet-50 with a feature pyramid, the configuration has another one"


def build_torchvision(setup: Setup) -> Torchvision:
    """The model with frozen norms, as its published weights have it, and drawn weights.

    Its names and its place of the strides (in 3x3 convolutions) are others than Detectron2's, so
    that no weights are shared; how long it takes does not depend on them.

    Args:
        setup: what the contenders share.
    """
    cfg, options = setup.cfg, setup.options
    smallest, largest = min(options.size), max(options.size)
    if setup.trained:
        smallest, largest = cfg.INPUT.MIN_SIZE_TEST or smallest, cfg.INPUT.MAX_SIZE_TEST
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(options.seed)
        model = FasterRCNN(
            resnet_fpn_backbone(backbone_name="resnet50", weights=None),
            num_classes=cfg.MODEL.ROI_HEADS.NUM_CLASSES + 1,
            min_size=smallest,
            max_size=max(largest, smallest),
        ).eval()
        image = torch.rand(1, 3, *options.size)
        settle_norms(model.backbone, lambda: model.backbone(image))
        keep_anchors(model.rpn.head.bbox_pred)
        predictor = model.roi_heads.box_predictor
        spread(predictor.cls_score, predictor.bbox_pred)
    return Torchvision(model.to(setup.device), setup.device)

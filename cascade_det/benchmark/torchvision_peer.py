"""torchvision's Faster R-CNN, or Mask R-CNN, with a ResNet-50 and a feature pyramid."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.roi_heads import maskrcnn_inference

from cascade_det.benchmark.models import ModelAdapter, ModelOutput
from cascade_det.benchmark.part_timers import time_parts
from cascade_det.benchmark.setup import Regions, Setup
from cascade_det.benchmark.weights import draw_predictor, keep_anchors, settle_norms
from cascade_det.core import Detections, ExitPolicy, PartTimer
from cascade_det.data.samples import Sample


class Torchvision(ModelAdapter):
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
        """Let the RPN return at most ``count`` regions per image."""
        self.model.rpn._post_nms_top_n["testing"] = count

    def set_exits(self, exits: ExitPolicy | None) -> None:
        """Does nothing: torchvision has no exits."""

    def inputs(self, batch: Sequence[Sample]) -> list[Tensor]:
        """Images as torchvision's loaders give them: float RGB ``[3, H, W]`` from 0 to 1."""
        return [(sample["image"].flip(0).float() / 255).to(self._device) for sample in batch]

    def prepare(
        self, batch: Sequence[Sample], regions: Regions, dtype: torch.dtype | None
    ) -> tuple[OrderedDict[str, Tensor], list[Tensor], list[tuple[int, int]]]:
        """The model's own features, with given regions."""
        images, _ = self.model.transform(self.inputs(batch))
        return self.model.backbone(images.tensors), regions.boxes, images.image_sizes

    def heads(self, prepared: Any) -> list[dict[str, Tensor]]:
        """Run the RoI heads alone."""
        return self.model.roi_heads(*prepared)[0]

    def prepare_masks(
        self, batch: Sequence[Sample], given: Sequence[Detections], dtype: torch.dtype | None
    ) -> tuple[Any, ...]:
        """The model's own features, with given detections."""
        images, _ = self.model.transform(self.inputs(batch))
        boxes, labels = [x.boxes for x in given], [x.classes + 1 for x in given]
        return self.model.backbone(images.tensors), boxes, images.image_sizes, labels

    def masks(self, prepared: tuple[Any, ...]) -> list[Tensor]:
        """Pool the detections and run the mask head alone."""
        heads, (*regions, labels) = self.model.roi_heads, prepared
        logits = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(*regions)))
        return [masks[:, 0] for masks in maskrcnn_inference(logits, labels)]

    def whole(self, inputs: list[Tensor]) -> list[dict[str, Tensor]]:
        """Run the whole model."""
        return self.model(inputs)

    def output(self, returned: list[dict[str, Tensor]]) -> ModelOutput:
        """Convert the results of a call."""
        detections = [
            # Class 0 is torchvision's background.
            Detections(x["boxes"], x["scores"], x["labels"] - 1, torch.zeros_like(x["labels"]))
            for x in returned
        ]
        return ModelOutput(detections, self._arrived, [self._arrived])

    def parts(self, inputs: list[Tensor], timer: PartTimer) -> None:
        """Run the whole model; the timer gets the milliseconds of its parts."""
        model = self.model
        starts = [
            (model.transform, "forward", "preprocess"),
            (model.backbone, "forward", "backbone"),
            (model.rpn, "forward", "rpn"),
            (model.roi_heads, "forward", "stage0"),
            (model.roi_heads, "postprocess_detections", "postprocess"),
        ]
        with time_parts(timer, starts):
            model(inputs)

    def _count(self, heads: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._arrived = sum(len(proposals) for proposals in inputs[1])


def build_torchvision(setup: Setup) -> Torchvision:
    """Build the model with frozen norms, as for its published weights, and random weights.

    Its parameter names differ from Detectron2's, and so does the place of its strides (the 3x3
    convolutions), so it cannot share weights. Its speed does not depend on them.

    Args:
        setup: what all models share.
    """
    cfg, options = setup.cfg, setup.options
    smallest, largest = min(options.size), max(options.size)
    if setup.trained:
        smallest, largest = cfg.INPUT.MIN_SIZE_TEST or smallest, cfg.INPUT.MAX_SIZE_TEST
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(options.seed)
        model = (MaskRCNN if cfg.MODEL.MASK_ON else FasterRCNN)(
            resnet_fpn_backbone(backbone_name="resnet50", weights=None),
            num_classes=cfg.MODEL.ROI_HEADS.NUM_CLASSES + 1,
            min_size=smallest,
            max_size=max(largest, smallest),
        ).eval()
        image = torch.rand(1, 3, *options.size)
        settle_norms(model.backbone, lambda: model.backbone(image))
        keep_anchors(model.rpn.head.bbox_pred)
        predictor = model.roi_heads.box_predictor
        draw_predictor(predictor.cls_score, predictor.bbox_pred)
    return Torchvision(model.to(setup.device), setup.device)

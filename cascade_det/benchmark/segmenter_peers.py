"""Segmenters of torchvision, and Detectron2's head on the backbone of ours, with drawn weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import segmentation

from cascade_det.core.structures import PartTimer, part
from cascade_det.data.samples import Sample
from cascade_det.segmentation.output import EncodedImages
from cascade_det.standalone.preprocess import normalise_and_stack
from cascade_det.standalone.segmenter import SemanticSegmentor

TORCHVISION: dict[str, Callable[..., Any]] = {
    "torchvision-fcn": segmentation.fcn_resnet50,
    "torchvision-deeplabv3": segmentation.deeplabv3_resnet50,
    "torchvision-lraspp": segmentation.lraspp_mobilenet_v3_large,
}


class Peer:
    """A segmenter with a backbone and a head, between the pre- and postprocessing of ours.

    Args:
        backbone: images ``[N, 3, H, W]`` to maps.
        head: maps to logits ``[N, K, H', W']``.
        like: its pre- and postprocessing.
        step: sides of a batch are multiples of it.
    """

    def __init__(
        self,
        backbone: Callable[[Tensor], Any],
        head: Callable[[Any], Tensor],
        *,
        like: SemanticSegmentor,
        step: int = 1,
    ) -> None:
        self.backbone = backbone
        self.head = head
        self.like = like
        self.step = step

    @torch.no_grad()
    def segment(self, batch: Sequence[Sample], timer: PartTimer | None = None) -> list[Tensor]:
        """Logits ``[K, height, width]`` of each image, in the size of the original."""
        with part(timer, "preprocess"):
            images, sizes = normalise_and_stack(
                [sample["image"] for sample in batch],
                self.like.pixel_mean,
                self.like.pixel_std,
                step=self.step,
            )
        with part(timer, "backbone"):
            maps = self.backbone(images)
        with part(timer, "stage0"):
            logits = self.head(maps)
        with part(timer, "postprocess"):
            size = images.shape[-2], images.shape[-1]
            scores = F.interpolate(logits, size, mode="bilinear", align_corners=False)
            return self.like.at_original_size(scores, EncodedImages([], size, sizes), batch)


def build_torchvision(name: str, num_classes: int, like: SemanticSegmentor) -> Peer:
    """One of ``TORCHVISION``; arguments as ``Peer``."""
    model = TORCHVISION[name](weights=None, weights_backbone=None, num_classes=num_classes)
    model.eval().to(like.device)
    if name == "torchvision-lraspp":
        return Peer(model.backbone, model.classifier, like=like)
    return Peer(model.backbone, lambda maps: model.classifier(maps["out"]), like=like)


def build_detectron2(num_classes: int, backbone: SemanticSegmentor) -> Peer:
    """Detectron2's ``SemSegFPNHead`` with its default width and norm.

    Args:
        num_classes: K.
        backbone: its backbone and levels are used, its own head is not.
    """
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead

    widths = [head.in_channels for head in backbone.sem_seg_head.heads][::-1]
    strides = [backbone.stride * 2**level for level in range(len(widths))]
    head = SemSegFPNHead(
        {
            name: ShapeSpec(channels=width, stride=stride)
            for name, width, stride in zip(backbone.in_features, widths, strides, strict=True)
        },
        num_classes=num_classes,
        conv_dims=128,
        common_stride=backbone.stride,
        norm="GN",
    )
    layers: Any = head.eval().to(backbone.device).layers
    # It upsamples in steps of two, so levels must fit exactly.
    step = max(backbone.size_divisibility, strides[-1])
    return Peer(backbone.backbone, layers, like=backbone, step=step)

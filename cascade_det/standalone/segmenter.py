"""A semantic segmenter without Detectron2, with Detectron2's names in its state dict."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade_det.core.modes import in_evaluation_mode
from cascade_det.core.structures import PartTimer, part
from cascade_det.data.samples import Sample
from cascade_det.engine.batches import check_images
from cascade_det.engine.segment import segment_in_parts
from cascade_det.segmentation.head import SegmentationHead
from cascade_det.segmentation.logits import resize
from cascade_det.segmentation.losses import SubsetLoss
from cascade_det.segmentation.output import EncodedImages, SegmenterOutput
from cascade_det.standalone.preprocess import normalise_and_stack
from cascade_det.standalone.segmenter_base import SegmenterBase


class SemanticSegmentor(SegmenterBase):
    """Images in, losses or scores of every pixel out.

    Args:
        backbone: a batch of images to maps by name.
        in_features: names of the maps that are decoded, finest first.
        stride: of the finest of them, in pixels.
        size_divisibility: sides of a batch of images are multiples of it.
        sem_seg_head: the decoder, for the maps of the backbone, coarsest first.
        loss: of the logits of all levels at the size of the labels.
        loss_weight: its factor.
        pixel_mean: of each channel, in the channel order of the images.
        pixel_std: of each channel, in the same order.
    """

    def __init__(
        self,
        *,
        backbone: Callable[[Tensor], dict[str, Tensor]],
        in_features: Sequence[str],
        stride: int,
        size_divisibility: int,
        sem_seg_head: SegmentationHead,
        loss: SubsetLoss,
        loss_weight: float,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__(
            loss=loss, loss_weight=loss_weight, pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        self.backbone = backbone
        self.in_features = tuple(in_features)
        self.stride = stride
        self.size_divisibility = size_divisibility
        self.sem_seg_head = sem_seg_head

    @in_evaluation_mode
    @torch.no_grad()
    def segment(
        self,
        batch: Sequence[Sample],
        *,
        levels: bool = False,
        timer: PartTimer | None = None,
    ) -> SegmenterOutput:
        """Segment a batch.

        Runs in evaluation mode and restores the mode of every module afterwards.

        Args:
            batch: samples with ``image`` (``[3, H, W]``) and, if it was resized, ``height`` and
                ``width`` of the original.
            levels: also report what the whole decoder predicts after each level.
            timer: measures the milliseconds of every part; with ``levels`` also those of the whole
                decoder, ``full/stage0`` and so on.

        Returns:
            Logits of the original's size, as Detectron2's ``SemanticSegmentor`` returns them.

        Raises:
            ValueError: an image is not a tensor ``[3, H, W]``, or has no pixels.
        """
        return segment_in_parts(self, batch, levels=levels, timer=timer)

    def encode(self, batch: Sequence[Sample], timer: PartTimer | None = None) -> EncodedImages:
        """The maps of a batch, in the mode of the modules; arguments as in ``segment``."""
        with part(timer, "preprocess"):
            images, sizes = self.preprocess(batch)
        with part(timer, "backbone"):
            return EncodedImages(self._maps(images), self._full_size(images), sizes)

    def at_original_size(
        self, scores: Tensor, encoded: EncodedImages, batch: Sequence[Sample]
    ) -> list[Tensor]:
        """``[N, K, *size]`` cut to each image and resized to its file, ``[K, height, width]``."""
        each = zip(scores, encoded.image_sizes, batch, strict=True)
        return [_at_original_size(x, own, sample) for x, own, sample in each]

    def preprocess(self, batch: Sequence[Sample]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Normalised images ``[N, 3, H, W]`` padded to the largest, and the size of each."""
        check_images(batch)
        return normalise_and_stack(
            [sample["image"] for sample in batch],
            self.pixel_mean,
            self.pixel_std,
            step=self.size_divisibility,
            memory_format=self.memory_format,
        )

    def scores(self, images: Tensor) -> Tensor:
        """Normalised and padded images ``[N, 3, H, W]`` to logits ``[N, K, H, W]`` of all levels.

        In the mode that the modules are in, and without exits.
        """
        logits = self._full_logits(images, [])
        return sum(logits[1:], logits[0])

    def _full_logits(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        size = self._full_size(images)
        height, width = images.shape[-2:]
        logits: list[Tensor] = self.sem_seg_head.decode(self._maps(images))
        return [resize(x, size)[..., :height, :width] for x in logits]

    def _maps(self, images: Tensor) -> list[Tensor]:
        maps = self.backbone(images)
        return [maps[name] for name in reversed(self.in_features)]

    def _full_size(self, images: Tensor) -> tuple[int, int]:
        """Sides of the finest map times its stride."""
        step = self.stride
        # ONNX rounds quotients of negative numbers up.
        height, width = ((side + step - 1) // step * step for side in images.shape[-2:])
        return height, width


def _at_original_size(scores: Tensor, size: tuple[int, int], sample: Sample) -> Tensor:
    """``[K, H, W]`` cut to the image's own ``size``, and resized to that of the file."""
    own = scores[None, :, : size[0], : size[1]]
    original = sample.get("height", size[0]), sample.get("width", size[1])
    return F.interpolate(own, original, mode="bilinear", align_corners=False)[0]

"""A segmenter of Detectron2 with the interface of a segmenter that the engine uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling import SemanticSegmentor
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from cascade_det.core import PartTimer
from cascade_det.core.modes import in_evaluation_mode
from cascade_det.core.structures import part
from cascade_det.d2.detector import image_channels, training_heads
from cascade_det.d2.sem_seg_head import CascadeSemSegHead
from cascade_det.data.samples import Sample
from cascade_det.engine.batches import check_images
from cascade_det.engine.segment import segment_in_parts
from cascade_det.segmentation.output import EncodedImages, SegmenterOutput, SegmenterStats


class Segmenter(nn.Module):
    """A segmenter of Detectron2: its inputs in, losses or scores of every pixel out.

    Args:
        model: returns ``sem_seg`` of each image.

    Attributes:
        has_levels: whether the model is a ``SemanticSegmentor`` with our head. Any other runs as a
            whole, without times of parts.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # An overridden method may do more than run the parts one after another.
        is_plain = getattr(type(model), "forward", None) is SemanticSegmentor.forward
        head = getattr(model, "sem_seg_head", None)
        self.has_levels = is_plain and isinstance(head, CascadeSemSegHead)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.model.parameters()).device

    def losses(self, batch: Sequence[Sample]) -> dict[str, Tensor]:
        """Losses of a batch; norms and dropout stay in their mode, and nothing is logged.

        Args:
            batch: samples with ``image`` and ``sem_seg``, the labels.

        Returns:
            Scalars by Detectron2's names.

        Raises:
            ValueError: the batch is empty, or ``segment`` refuses one of its images.
        """
        if len(batch) == 0:
            raise ValueError("the batch is empty: losses need at least one image")
        check_images(batch, image_channels(self.model))
        with training_heads(self.model), EventStorage():
            losses: dict[str, Tensor] = self.model(batch)
        return losses

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
            batch: samples with ``image`` and, if it was resized, ``height`` and ``width`` of the
                original.
            levels: also report what the whole decoder predicts after each level, where
                ``has_levels``.
            timer: measures the milliseconds of every part, see ``segment_in_parts``.

        Returns:
            Logits of the original's size.

        Raises:
            ValueError: an image is not a tensor ``[3, H, W]``, or has no pixels.
        """
        if self.has_levels:
            return segment_in_parts(self, batch, levels=levels, timer=timer)
        if len(batch) == 0:
            return SegmenterOutput([], SegmenterStats())
        check_images(batch, image_channels(self.model))
        with part(timer, "model"):
            found = self.model(batch)
        return SegmenterOutput([one["sem_seg"] for one in found], SegmenterStats())

    @property
    def sem_seg_head(self) -> CascadeSemSegHead:
        """The decoder, where ``has_levels``."""
        model: Any = self.model
        head: CascadeSemSegHead = model.sem_seg_head
        return head

    def encode(self, batch: Sequence[Sample], timer: PartTimer | None = None) -> EncodedImages:
        """The maps of a batch, in the mode of the modules, where ``has_levels``."""
        check_images(batch, image_channels(self.model))
        model: Any = self.model
        head = self.sem_seg_head
        with part(timer, "preprocess"):
            images = ImageList.from_tensors(
                [(x["image"].to(model.device) - model.pixel_mean) / model.pixel_std for x in batch],
                model.backbone.size_divisibility,
                padding_constraints=model.backbone.padding_constraints,
            )
        with part(timer, "backbone"):
            maps = head.decoded_maps(model.backbone(images.tensor))
        return EncodedImages(maps, head.full_size(maps), images.image_sizes)

    def at_original_size(
        self, scores: Tensor, encoded: EncodedImages, batch: Sequence[Sample]
    ) -> list[Tensor]:
        """``[N, K, *size]`` cut to each image and resized to its file, ``[K, height, width]``."""
        return [
            sem_seg_postprocess(
                x, size, sample.get("height", size[0]), sample.get("width", size[1])
            )
            for x, size, sample in zip(scores, encoded.image_sizes, batch, strict=True)
        ]

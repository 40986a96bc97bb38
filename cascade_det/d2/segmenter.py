"""A segmenter of Detectron2 with the interface of a segmenter that the engine uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from cascade_det.d2.heads_call import HeadsCall
from cascade_det.d2.sem_seg_head import CascadeSemSegHead
from cascade_det.data.samples import Sample
from cascade_det.engine.batches import check_images
from cascade_det.segmentation.output import SegmenterOutput, SegmenterStats


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
        self, batch: Sequence[Sample], *, timer: PartTimer | None = None
    ) -> SegmenterOutput:
        """Segment a batch.

        Runs in evaluation mode and restores the mode of every module afterwards.

        Args:
            batch: samples with ``image`` and, if it was resized, ``height`` and ``width`` of the
                original.
            timer: measures the milliseconds of every part.

        Returns:
            Logits of the original's size.

        Raises:
            ValueError: an image is not a tensor ``[3, H, W]``, or has no pixels.
        """
        if len(batch) == 0:
            return SegmenterOutput([], SegmenterStats())
        check_images(batch, image_channels(self.model))
        if self.has_levels:
            return self._segment_in_parts(batch, timer)
        with part(timer, "model"):
            found = self.model(batch)
        return SegmenterOutput([one["sem_seg"] for one in found], SegmenterStats())

    def _segment_in_parts(
        self, batch: Sequence[Sample], timer: PartTimer | None
    ) -> SegmenterOutput:
        model: Any = self.model
        with part(timer, "preprocess"):
            images = ImageList.from_tensors(
                [(x["image"].to(model.device) - model.pixel_mean) / model.pixel_std for x in batch],
                model.backbone.size_divisibility,
                padding_constraints=model.backbone.padding_constraints,
            )
        with part(timer, "backbone"):
            maps = model.backbone(images.tensor)
        with HeadsCall(timer).within():
            scores, _ = model.sem_seg_head(maps)
        with part(timer, "postprocess"):
            resized = [
                sem_seg_postprocess(
                    x, size, sample.get("height", size[0]), sample.get("width", size[1])
                )
                for x, size, sample in zip(scores, images.image_sizes, batch, strict=True)
            ]
        left: list[Mapping[str, int]] = [{} for _ in model.sem_seg_head.heads[1:]]
        left.append({"completed": len(batch)})
        return SegmenterOutput(resized, SegmenterStats(left=left))

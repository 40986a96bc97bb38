"""What the segmenters of this host share: pixel statistics, losses at the size of the labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cascade_det.core.structures import PartTimer
from cascade_det.data.samples import Sample
from cascade_det.engine.precision import channels_last_in_half
from cascade_det.segmentation.losses import SubsetLoss
from cascade_det.segmentation.output import SegmenterOutput


class SegmenterBase(nn.Module):
    """Images in, losses or scores of every pixel out.

    Args:
        loss: of the logits of all levels at the size of the labels.
        loss_weight: its factor.
        pixel_mean: of each channel, in the channel order of the images.
        pixel_std: of each channel, in the same order.

    Attributes:
        optimizations: the changes made by ``optimize_segmenter``, one sentence each; empty before
            it. An optimised segmenter cannot be trained.
        memory_format: of the batch of images.
    """

    def __init__(
        self,
        *,
        loss: SubsetLoss,
        loss_weight: float,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__()
        self.loss = loss
        self.loss_weight = loss_weight
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        mean, std = torch.tensor(pixel_mean), torch.tensor(pixel_std)
        self.register_buffer("pixel_mean", mean.view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", std.view(-1, 1, 1), persistent=False)
        self.optimizations: list[str] = []
        self.memory_format = torch.contiguous_format

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.pixel_mean.device

    def forward(self, batch: Sequence[Sample]) -> dict[str, Tensor]:
        """The same as ``losses``, for wrappers that call ``forward``."""
        return self.losses(batch)

    def losses(self, batch: Sequence[Sample]) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            batch: samples with ``image`` (``[3, H, W]``, values 0 to 255) and ``sem_seg`` (int64
                ``[H, W]``: classes, or the value that is ignored).

        Returns:
            ``loss_sem_seg``, Detectron2's name.

        Raises:
            RuntimeError: the segmenter was optimised for inference.
            ValueError: the batch is empty, or an image or its labels have another shape.
        """
        if self.optimizations:
            raise RuntimeError(
                "an optimised segmenter cannot be trained: its norms are folded. Build it again "
                "without optimize_segmenter()"
            )
        if len(batch) == 0:
            raise ValueError("the batch is empty: losses need at least one image")
        images, sizes = self.preprocess(batch)
        for sample, size in zip(batch, sizes, strict=True):
            given = sample["sem_seg"].shape
            if given != size:
                raise ValueError(f"labels of shape {list(given)} for {list(size)} pixels")
        logits = self._full_logits(channels_last_in_half(images), sizes)
        labels = images.new_full(
            (len(batch), *logits[0].shape[-2:]), self.loss.ignore_value, dtype=torch.int64
        )
        for padded, sample, (height, width) in zip(labels, batch, sizes, strict=True):
            padded[:height, :width] = sample["sem_seg"]
        return {"loss_sem_seg": self.loss_weight * self.loss(logits, labels)}

    def segment(
        self, batch: Sequence[Sample], *, levels: bool = False, timer: PartTimer | None = None
    ) -> SegmenterOutput:
        """Segment a batch, see the subclasses."""
        raise NotImplementedError

    def preprocess(self, batch: Sequence[Sample]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Images as the network takes them, and the size of each in the batch."""
        raise NotImplementedError

    def _full_logits(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Logits ``[N, K, H, W]`` of every level for images of up to H x W pixels, padded."""
        raise NotImplementedError

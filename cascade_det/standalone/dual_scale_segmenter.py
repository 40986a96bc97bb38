"""A segmenter that sees images at two scales, with MERIT's official names in its state dict."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade_det.core.modes import in_evaluation_mode
from cascade_det.core.structures import PartTimer, part
from cascade_det.data.samples import Sample
from cascade_det.engine.batches import check_images
from cascade_det.engine.segment import left_after_levels
from cascade_det.segmentation.dual_scale import DualScaleNetwork
from cascade_det.segmentation.logits import resize
from cascade_det.segmentation.losses import SubsetLoss
from cascade_det.segmentation.output import SegmenterOutput, SegmenterStats
from cascade_det.standalone.preprocess import normalise_and_stack
from cascade_det.standalone.segmenter_base import SegmenterBase


class DualScaleSegmentor(SegmenterBase):
    """Images of any size in, losses or scores of every pixel out.

    Each image is resized to the first square of the network, and its logits back, whatever the
    other images of the batch are (arXiv 2303.16892, section 4.2, and the published code: data are
    resized to the first size, of which the network makes the second).

    Args:
        network: its parts are registered here, under their official names.
        grey: gives the network the first of the equal channels of a grey image, through ``conv``,
            its stem of grey images; otherwise that stem is frozen, and all channels are used.
        loss: of the logits of all levels at the size of the labels.
        loss_weight: its factor.
        pixel_mean: of each channel, in the channel order of the images.
        pixel_std: of each channel, in the same order.

    Attributes:
        network: not a submodule.
    """

    def __init__(
        self,
        *,
        network: DualScaleNetwork,
        grey: bool = False,
        loss: SubsetLoss,
        loss_weight: float,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__(
            loss=loss, loss_weight=loss_weight, pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        # Not by nn.Module.__setattr__, which would put its name before the official ones.
        self.__dict__["network"] = network
        self.network: DualScaleNetwork
        for name, module in network.named_children():
            self.add_module(name, module)
        self.grey = grey
        # Without a gradient several processes would wait for it.
        network.conv.requires_grad_(grey)

    @in_evaluation_mode
    @torch.no_grad()
    def segment(
        self, batch: Sequence[Sample], *, levels: bool = False, timer: PartTimer | None = None
    ) -> SegmenterOutput:
        """Segment a batch; arguments, result and errors as of ``SemanticSegmentor.segment``."""
        if len(batch) == 0:
            return SegmenterOutput([], SegmenterStats(), [] if levels else None)
        with part(timer, "preprocess"):
            images, sizes = self.preprocess(batch)
        logits = self.network(images, timer)
        with part(timer, "postprocess"):
            # The last is the prediction.
            *early, scores = torch.stack(logits).cumsum(0)
            originals = [
                (sample.get("height", rows), sample.get("width", columns))
                for sample, (rows, columns) in zip(batch, sizes, strict=True)
            ]
            resized = _each_resized(scores, originals)
        after_levels = None
        if levels:
            each_level = [*(_each_resized(x, originals) for x in early), resized]
            after_levels = [[x.argmax(0) for x in level] for level in each_level]
        left = left_after_levels(None, len(batch), len(logits))
        return SegmenterOutput(resized, SegmenterStats(left=left), after_levels)

    def preprocess(self, batch: Sequence[Sample]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Normalised images ``[N, 1 or 3, side, side]``, and the size of each in the batch."""
        check_images(batch)
        squares, sizes = [], []
        for sample in batch:
            image, (size,) = normalise_and_stack([sample["image"]], self.pixel_mean, self.pixel_std)
            squares.append(resize(image[:, :1] if self.grey else image, self._square))
            sizes.append(size)
        return torch.cat(squares), sizes

    def _full_logits(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        height, width = (max(sides) for sides in zip(*sizes, strict=True))

        def padded(x: Tensor, size: tuple[int, int]) -> Tensor:
            return F.pad(resize(x[None], size), (0, width - size[1], 0, height - size[0]))

        return [
            torch.cat([padded(x, size) for x, size in zip(level, sizes, strict=True)])
            for level in self.network(images)
        ]

    @property
    def _square(self) -> tuple[int, int]:
        side = self.network.sizes[0]
        return side, side


def _each_resized(scores: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    return [resize(x[None], size)[0] for x, size in zip(scores, sizes, strict=True)]

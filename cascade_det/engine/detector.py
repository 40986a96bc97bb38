"""What engine, calibration and monitoring require of a detector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor, nn

from cascade_det.core import CascadeHead, CascadeInputs, DetectorOutput, ExitPolicy, PartTimer
from cascade_det.core.recorded_tiles import TileProposals
from cascade_det.data.samples import Sample
from cascade_det.segmentation.head import SegmentationHead
from cascade_det.segmentation.output import EncodedImages, SegmenterOutput


class InferenceDetector(Protocol):
    """What inference needs of a detector."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters."""

    def detect(
        self,
        batch: Sequence[Sample],
        *,
        stages: bool | Sequence[bool] = False,
        timer: PartTimer | None = None,
    ) -> DetectorOutput:
        """Detect in evaluation mode, leaving every module in the mode it was in.

        Args:
            batch: samples.
            stages: also report what each stage alone would give: for all images or for some.
            timer: measures the milliseconds of each part.
        """


class Detector(InferenceDetector, Protocol):
    """A detector of either host. Both are ``nn.Module``, for which Python has no protocol."""

    @property
    def dtype(self) -> str:
        """The type or types it computes in, for a report."""

    def losses(self, batch: Sequence[Sample]) -> dict[str, Tensor]:
        """Scalar losses of a batch with ground truth, by Detectron2's names."""


class Segmenter(Protocol):
    """A semantic segmenter, an ``nn.Module``."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters."""

    def segment(
        self,
        batch: Sequence[Sample],
        *,
        levels: bool = False,
        timer: PartTimer | None = None,
    ) -> SegmenterOutput:
        """Segment in evaluation mode, leaving every module in the mode it was in.

        Args:
            batch: samples.
            levels: also report what the whole decoder predicts after each level.
            timer: measures the milliseconds of each part.
        """

    def losses(self, batch: Sequence[Sample]) -> dict[str, Tensor]:
        """Scalar losses of a batch with labels, by Detectron2's names."""


class CascadeSegmenter(Segmenter, Protocol):
    """A segmenter around a CASCADE decoder."""

    @property
    def sem_seg_head(self) -> SegmentationHead:
        """The decoder, its predictions and its exits."""

    def encode(self, batch: Sequence[Sample], timer: PartTimer | None = None) -> EncodedImages:
        """The maps of a batch, in the mode of the modules."""

    def at_original_size(
        self, scores: Tensor, encoded: EncodedImages, batch: Sequence[Sample]
    ) -> list[Tensor]:
        """``[N, K, *size]`` cut to each image and resized to its file, ``[K, height, width]``."""


class CascadeDetector(Detector, Protocol):
    """A detector around a cascade."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules, as of ``nn.Module``."""

    @property
    def cascade(self) -> CascadeHead:
        """The cascade."""

    def cascade_inputs(self, batch: Sequence[Sample]) -> CascadeInputs:
        """Features and proposals of a batch."""

    def gated_inputs(
        self, batch: Sequence[Sample], tile_thresholds: Sequence[float]
    ) -> tuple[CascadeInputs, TileProposals | None]:
        """Features of a batch, and the proposals of some tile thresholds together.

        Args:
            batch: samples.
            tile_thresholds: 0 first, the whole map.

        Returns:
            The inputs, and which proposals belong to each threshold; ``None`` with the proposals
            of the whole map if that cannot be computed in tiles.
        """

    def set_exits(self, exits: ExitPolicy | None) -> None:
        """Replace the exit policy."""

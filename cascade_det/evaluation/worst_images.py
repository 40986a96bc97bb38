"""The images of a data set that a segmenter gets most wrong."""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade_det.data.samples import Sample

Labels = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, order=True)
class WorstImage:
    """One image; the first in order is the worst.

    Attributes:
        mean_iou: in percent, over the classes in the truth of the image.
        image_id: of the sample.
        file_name: of the sample.
        pixel_accuracy: in percent.
    """

    mean_iou: float
    image_id: int
    file_name: str
    pixel_accuracy: float
    _compressed: bytes = field(repr=False)
    _shape: tuple[int, ...]
    _dtype: str

    @property
    def prediction(self) -> Labels:
        """The predicted class of each pixel, ``[H, W]``."""
        content = np.frombuffer(zlib.decompress(self._compressed), self._dtype)
        return content.reshape(self._shape)


class WorstImages:
    """Keeps the images with the lowest mean IoU, and their predictions, compressed.

    Args:
        most: how many.

    Attributes:
        images: sorted, the worst first.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.images: list[WorstImage] = []

    def add(
        self, sample: Sample, prediction: Labels, mean_iou: float, pixel_accuracy: float
    ) -> None:
        """Add an image.

        Args:
            sample: has ``image_id`` and ``file_name``.
            prediction: integers ``[H, W]`` from 0 on.
            mean_iou: in percent; nan, of an image without a pixel that counts, is left out.
            pixel_accuracy: in percent.
        """
        full = len(self.images) == self._most
        if np.isnan(mean_iou) or (full and mean_iou > self.images[-1].mean_iou):
            return
        labels = prediction.astype(np.min_scalar_type(int(prediction.max())))
        content = zlib.compress(labels.tobytes(), 1)
        where = sample["image_id"], sample["file_name"]
        self.merge(
            [WorstImage(mean_iou, *where, pixel_accuracy, content, labels.shape, labels.dtype.str)]
        )

    def merge(self, images: Iterable[WorstImage]) -> None:
        """Add images that another one kept."""
        self.images = heapq.nsmallest(self._most, [*self.images, *images])

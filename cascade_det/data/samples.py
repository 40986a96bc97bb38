"""Reads and transforms samples for training and testing, in the workers of a loader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from cascade_det.data.coco import ImageRecord
from cascade_det.data.sampler import (
    SampleReference,
    augmentation_generator,
    replacement_generator,
)
from cascade_det.data.transforms import Pixels, TrainTransform, read_image, resize_shortest_edge
from cascade_det.errors import DatasetError

Sample = dict[str, Any]
Batch = list[Sample]
_Reference = TypeVar("_Reference")

# This many broken images in a row suggest another cause, such as an unmounted disk.
REPLACEMENTS_TRIED = 20


class Fetched(NamedTuple):
    """The result of a worker: a batch, or the error that ends the loading."""

    batch: Batch
    # Messages about broken images that were replaced in the batch.
    replaced: list[str]
    error: DatasetError | None = None


class _Samples(Dataset[Sample], Generic[_Reference], ABC):
    """Makes samples, a batch at a time; a ``DatasetError`` is returned to the loader."""

    @abstractmethod
    def __getitem__(self, reference: _Reference) -> Sample: ...

    def __getitems__(self, references: list[_Reference]) -> Fetched:
        replaced: list[str] = []
        try:
            batch = [self._make(reference, replaced) for reference in references]
        except DatasetError as error:
            return Fetched([], replaced, error)
        return Fetched(batch, replaced)

    def _make(self, reference: _Reference, replaced: list[str]) -> Sample:
        return self[reference]


class TrainingSamples(_Samples[SampleReference]):
    """Augmented samples by (position in the stream, index of the image)."""

    def __init__(
        self,
        records: list[ImageRecord],
        transform: TrainTransform,
        image_format: str,
        seed: int,
        *,
        groups: Sequence[int],
        replace_broken: bool,
    ) -> None:
        self.records = records
        self.transform = transform
        self.image_format = image_format
        self.seed = seed
        self.groups = np.asarray(groups)
        self.replace_broken = replace_broken

    def __getitem__(self, reference: SampleReference) -> Sample:
        position, index = reference
        return _annotated_sample(
            self.records[index],
            self.transform,
            self.image_format,
            augmentation_generator(self.seed, position),
        )

    def _make(self, reference: SampleReference, replaced: list[str]) -> Sample:
        try:
            return self[reference]
        except DatasetError as error:
            if not self.replace_broken:
                raise
            replaced.append(str(error))
            return self._replacement(reference, replaced)

    def _replacement(self, reference: SampleReference, replaced: list[str]) -> Sample:
        """The first readable image of random others in the same group."""
        position, broken = reference
        others = np.flatnonzero(self.groups == self.groups[broken])
        generator = replacement_generator(self.seed, position)
        for index in generator.permutation(others[others != broken])[:REPLACEMENTS_TRIED].tolist():
            try:
                return self[position, index]
            except DatasetError as error:
                replaced.append(str(error))
        raise DatasetError(
            f"no image could be read in place of a broken one, the last said: {replaced[-1]}"
        )


class TestSamples(_Samples[int]):
    """Resized samples by index of the image."""

    def __init__(
        self, records: list[ImageRecord], short_edge: int, max_size: int, image_format: str
    ) -> None:
        self.records = records
        self.short_edge = short_edge
        self.max_size = max_size
        self.image_format = image_format

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, reference: int) -> Sample:
        record = self.records[reference]
        image = _read(record, self.image_format)
        return _sample(record, resize_shortest_edge(image, self.short_edge, self.max_size))


class AnnotatedSamples(TestSamples):
    """Test samples with boxes and classes, for losses on a test set."""

    def __init__(
        self, records: list[ImageRecord], short_edge: int, max_size: int, image_format: str
    ) -> None:
        super().__init__(records, short_edge, max_size, image_format)
        self.transform = TrainTransform(
            min_sizes=(short_edge,), max_size=max_size, sampling="choice", flip="none"
        )

    def __getitem__(self, reference: int) -> Sample:
        unused = np.random.default_rng(0)
        return _annotated_sample(self.records[reference], self.transform, self.image_format, unused)


def _annotated_sample(
    record: ImageRecord,
    transform: TrainTransform,
    image_format: str,
    generator: np.random.Generator,
) -> Sample:
    usable = ~record.iscrowd
    image, boxes, classes = transform(
        _read(record, image_format), record.boxes[usable], record.classes[usable], generator
    )
    return {
        **_sample(record, image),
        "gt_boxes": torch.from_numpy(boxes),
        "gt_classes": torch.from_numpy(classes),
    }


def _read(record: ImageRecord, image_format: str) -> Pixels:
    image = read_image(record.file_name, image_format)
    height, width = image.shape[:2]
    if (height, width) != (record.height, record.width):
        raise DatasetError(
            f"{record.file_name}: the image is {width}x{height} pixels (width x height, upright), "
            f"but the json says {record.width}x{record.height} for image {record.image_id}. "
            "Correct the json: its boxes would be in the wrong place."
        )
    return image


def _sample(record: ImageRecord, image: Pixels) -> Sample:
    # np.array, unlike ascontiguousarray, always makes a writable copy, as torch requires.
    channels_first = np.array(image.transpose(2, 0, 1), order="C")
    return {
        "image": torch.from_numpy(channels_first),
        "height": record.height,
        "width": record.width,
        "image_id": record.image_id,
        "file_name": record.file_name,
    }

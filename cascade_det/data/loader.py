"""From data sets to batches: lists of sample dicts.

A sample holds ``image`` (uint8 ``[3, H, W]``, resized), ``height`` and ``width`` (of the original),
``image_id`` and ``file_name``; for training also ``gt_boxes`` (float32 ``[G, 4]``, XYXY in pixels
of the resized image) and ``gt_classes`` (int64 ``[G]``), without crowds.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cascade_det.data.coco import CocoDataset, ImageRecord, check_same_classes
from cascade_det.data.sampler import (
    SampleReference,
    TrainingBatchSampler,
    aspect_ratio_groups,
    augmentation_generator,
)
from cascade_det.data.transforms import Pixels, TrainTransform, read_image, resize_shortest_edge
from cascade_det.errors import DatasetError

logger = logging.getLogger(__name__)

Sample = dict[str, Any]
Batch = list[Sample]
_Reference = TypeVar("_Reference")


def build_train_loader(
    datasets: Sequence[CocoDataset],
    *,
    min_sizes: Sequence[int],
    max_size: int,
    sampling: str,
    flip: str,
    image_format: str,
    images_per_batch: int,
    num_workers: int,
    aspect_ratio_grouping: bool,
    filter_empty: bool,
    seed: int,
    start_batch: int = 0,
) -> DataLoader[Sample]:
    """Build an endless loader of training batches.

    Batch *i* depends on the seed and *i* alone, whatever the number of workers and wherever the
    loader started. Every ``iter()`` starts again at ``start_batch``.

    Args:
        datasets: one or more, with the same classes; their images are shuffled together.
        min_sizes: see :class:`TrainTransform`, as for ``max_size``, ``sampling`` and ``flip``.
        max_size: see ``min_sizes``.
        sampling: see ``min_sizes``.
        flip: see ``min_sizes``.
        image_format: ``"BGR"`` or ``"RGB"``.
        images_per_batch: images in every batch.
        num_workers: processes that read ahead; 0 reads in this one.
        aspect_ratio_grouping: whether landscape and portrait images go in separate batches.
        filter_empty: whether to leave out images that have no box, or only crowds.
        seed: 0 or more.
        start_batch: the number of the first batch, to resume a run.

    Raises:
        DatasetError: no image to train on, or different classes; while iterating, an image that
            cannot be read or is not of the size that the json says.
        ValueError: a value out of range.
    """
    check_same_classes(datasets)
    records = _training_records(datasets, filter_empty)
    sizes = [(record.height, record.width) for record in records]
    transform = TrainTransform(min_sizes=min_sizes, max_size=max_size, sampling=sampling, flip=flip)
    return _Loader(
        _TrainingSamples(records, transform, image_format, seed),
        batch_sampler=TrainingBatchSampler(
            len(records),
            images_per_batch,
            seed=seed,
            groups=aspect_ratio_groups(sizes) if aspect_ratio_grouping else None,
            start_batch=start_batch,
        ),
        **_loader_arguments(num_workers),
    )


def build_test_loader(
    dataset: CocoDataset,
    *,
    min_sizes: Sequence[int],
    max_size: int,
    image_format: str,
    images_per_batch: int,
    num_workers: int,
) -> DataLoader[Sample]:
    """Build a loader that gives every image once, by image id; the last batch may be shorter.

    Args:
        dataset: may be without annotations; they are not read.
        min_sizes: one shorter edge in pixels; 0 for no resizing.
        max_size: largest longer edge in pixels.
        image_format: ``"BGR"`` or ``"RGB"``.
        images_per_batch: images in a batch.
        num_workers: processes that read ahead; 0 reads in this one.

    Raises:
        DatasetError: while iterating, an image that cannot be read or is not of the size that the
            json says.
        ValueError: not exactly one size.
    """
    if len(min_sizes) != 1:
        raise ValueError(f"testing takes one size, not min_sizes {tuple(min_sizes)}")
    return _Loader(
        _TestSamples(dataset.records, min_sizes[0], max_size, image_format),
        batch_size=images_per_batch,
        **_loader_arguments(num_workers),
    )


def _training_records(datasets: Sequence[CocoDataset], filter_empty: bool) -> list[ImageRecord]:
    records = [record for dataset in datasets for record in dataset.records]
    if filter_empty:
        total = len(records)
        records = [record for record in records if not record.iscrowd.all()]
        logger.info("%d of %d images have boxes to train on", len(records), total)
    if not records:
        names = ", ".join(repr(dataset.source.name) for dataset in datasets)
        raise DatasetError(
            f"nothing to train on in {names or 'no data set'}: there is no image"
            + (" with a box that is not a crowd" if filter_empty else "")
        )
    return records


def _loader_arguments(num_workers: int) -> dict[str, Any]:
    return {
        "num_workers": num_workers,
        "collate_fn": _as_it_is,
        # Its own generator: starting to iterate must not advance the run's global one, which a
        # resumed run could not repeat.
        "generator": torch.Generator(),
    }


def _as_it_is(batch: Batch) -> Batch:
    return batch


class _Loader(DataLoader[Sample]):
    """A DataLoader that raises the errors of its workers as they were.

    PyTorch raises them with the worker's whole traceback as the message.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, DatasetError):
                raise batch
            yield batch


class _Samples(Dataset[Sample], Generic[_Reference], ABC):
    """Makes samples, a batch at a time; a user's error is handed to :class:`_Loader`."""

    @abstractmethod
    def __getitem__(self, reference: _Reference) -> Sample: ...

    def __getitems__(self, references: list[_Reference]) -> Batch | DatasetError:
        try:
            return [self[reference] for reference in references]
        except DatasetError as error:
            return error


class _TrainingSamples(_Samples[SampleReference]):
    def __init__(
        self, records: list[ImageRecord], transform: TrainTransform, image_format: str, seed: int
    ) -> None:
        self.records = records
        self.transform = transform
        self.image_format = image_format
        self.seed = seed

    def __getitem__(self, reference: SampleReference) -> Sample:
        position, index = reference
        record = self.records[index]
        usable = ~record.iscrowd
        image, boxes, classes = self.transform(
            _read(record, self.image_format),
            record.boxes[usable],
            record.classes[usable],
            augmentation_generator(self.seed, position),
        )
        return {
            **_sample(record, image),
            "gt_boxes": torch.from_numpy(boxes),
            "gt_classes": torch.from_numpy(classes),
        }


class _TestSamples(_Samples[int]):
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
    # np.array and not ascontiguousarray: always a writable copy, which torch asks for.
    channels_first = np.array(image.transpose(2, 0, 1), order="C")
    return {
        "image": torch.from_numpy(channels_first),
        "height": record.height,
        "width": record.width,
        "image_id": record.image_id,
        "file_name": record.file_name,
    }

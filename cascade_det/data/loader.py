"""From data sets to batches: lists of sample dicts.

A sample holds ``image`` (uint8 ``[3, H, W]``, resized), ``height`` and ``width`` (of the original),
``image_id`` and ``file_name``; for training also ``gt_boxes`` (float32 ``[G, 4]``, XYXY in pixels
of the resized image) and ``gt_classes`` (int64 ``[G]``), without crowds.
"""

from __future__ import annotations

import logging
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cascade_det.data.coco import CocoDataset, ImageRecord, check_same_classes
from cascade_det.data.sampler import (
    SampleReference,
    TrainingBatchSampler,
    aspect_ratio_groups,
    augmentation_generator,
    replacement_generator,
)
from cascade_det.data.transforms import Pixels, TrainTransform, read_image, resize_shortest_edge
from cascade_det.errors import DatasetError

logger = logging.getLogger(__name__)

Sample = dict[str, Any]
Batch = list[Sample]
_Reference = TypeVar("_Reference")

# So many broken images in a row mean that something else is wrong, such as a disk that is gone.
_REPLACEMENTS_TRIED = 20


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
    share: tuple[int, int] = (0, 1),
    on_bad_data: str = "error",
) -> DataLoader[Sample]:
    """Build an endless loader of training batches.

    Batch *i* depends on the seed and *i* alone, whatever the number of workers and processes and
    wherever the loader started. Every ``iter()`` starts again at ``start_batch``.

    Args:
        datasets: one or more, with the same classes; their images are shuffled together.
        min_sizes: see :class:`TrainTransform`, as for ``max_size``, ``sampling`` and ``flip``.
        max_size: see ``min_sizes``.
        sampling: see ``min_sizes``.
        flip: see ``min_sizes``.
        image_format: ``"BGR"`` or ``"RGB"``.
        images_per_batch: images in every batch, over all processes.
        num_workers: processes that read ahead; 0 reads in this one.
        aspect_ratio_grouping: whether landscape and portrait images go in separate batches.
        filter_empty: whether to leave out images that have no box, or only crowds.
        seed: 0 or more.
        start_batch: the number of the first batch, to resume a run.
        share: (rank, number of processes): this process gets the rank-th part of every batch.
        on_bad_data: for an image that turns out to be broken when it is read: ``"error"`` raises;
            ``"skip"`` logs it, and takes another image that depends on the seed and on the place
            in the stream alone.

    Raises:
        ConfigError: the processes cannot share ``images_per_batch`` evenly.
        DatasetError: no image to train on, or different classes; while iterating, an image that
            cannot be read or is not of the size that the json says.
        ValueError: a value out of range.
    """
    check_same_classes(datasets)
    records = _training_records(datasets, filter_empty)
    sizes = [(record.height, record.width) for record in records]
    groups = aspect_ratio_groups(sizes) if aspect_ratio_grouping else [0] * len(sizes)
    transform = TrainTransform(min_sizes=min_sizes, max_size=max_size, sampling=sampling, flip=flip)
    return _Loader(
        _TrainingSamples(
            records,
            transform,
            image_format,
            seed,
            groups=groups,
            replace_broken=on_bad_data == "skip",
        ),
        batch_sampler=TrainingBatchSampler(
            len(records),
            images_per_batch,
            seed=seed,
            groups=groups,
            start_batch=start_batch,
            share=share,
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
    share: tuple[int, int] = (0, 1),
    annotated: bool = False,
) -> DataLoader[Sample]:
    """Build a loader that gives every image once, by image id; the last batch may be shorter.

    Args:
        dataset: may be without annotations.
        min_sizes: one shorter edge in pixels; 0 for no resizing.
        max_size: largest longer edge in pixels.
        image_format: ``"BGR"`` or ``"RGB"``.
        images_per_batch: images in a batch of this process.
        num_workers: processes that read ahead; 0 reads in this one.
        share: (rank, number of processes): this process gets the rank-th part of the images, all
            in one piece; none where there are fewer images than processes before it.
        annotated: whether samples have ``gt_boxes`` and ``gt_classes`` as in training.

    Raises:
        DatasetError: while iterating, an image that cannot be read or is not of the size that the
            json says.
        ValueError: not exactly one size.
    """
    if len(min_sizes) != 1:
        raise ValueError(f"testing takes one size, not min_sizes {tuple(min_sizes)}")
    rank, processes = share
    total = len(dataset.records)
    records = dataset.records[total * rank // processes : total * (rank + 1) // processes]
    samples = _AnnotatedSamples if annotated else _TestSamples
    return _Loader(
        samples(records, min_sizes[0], max_size, image_format),
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
        "worker_init_fn": _ignore_interrupt if num_workers else None,
        # Its own generator: starting to iterate must not advance the run's global one, which a
        # resumed run could not repeat.
        "generator": torch.Generator(),
    }


def _as_it_is(fetched: _Fetched) -> _Fetched:
    return fetched


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal; what to do about it is the main one's business.

    It ends its workers itself when it is done, with the batches that it still wants.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Fetched(NamedTuple):
    """What a worker hands over: a batch, or the error that ends the loading."""

    batch: Batch
    # Messages about broken images that others of the batch stand in for.
    replaced: list[str]
    error: DatasetError | None = None


class _Loader(DataLoader[Sample]):
    """A DataLoader that raises the errors of its workers as they were, and logs in one process.

    PyTorch raises them with the worker's whole traceback as the message.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        known: set[str] = set()
        for fetched in super().__iter__():
            if fetched.error is not None:
                raise fetched.error
            for message in fetched.replaced:
                if message not in known:
                    known.add(message)
                    logger.warning(
                        "%s. Another image is trained on in its place (broken images so far: %d)",
                        message,
                        len(known),
                    )
            yield fetched.batch


class _Samples(Dataset[Sample], Generic[_Reference], ABC):
    """Makes samples, a batch at a time; a user's error is handed to :class:`_Loader`."""

    @abstractmethod
    def __getitem__(self, reference: _Reference) -> Sample: ...

    def __getitems__(self, references: list[_Reference]) -> _Fetched:
        replaced: list[str] = []
        try:
            batch = [self._make(reference, replaced) for reference in references]
        except DatasetError as error:
            return _Fetched([], replaced, error)
        return _Fetched(batch, replaced)

    def _make(self, reference: _Reference, replaced: list[str]) -> Sample:
        return self[reference]


class _TrainingSamples(_Samples[SampleReference]):
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
        """The first readable one of some other images of the same group, drawn by position."""
        position, broken = reference
        others = np.flatnonzero(self.groups == self.groups[broken])
        generator = replacement_generator(self.seed, position)
        for index in generator.permutation(others[others != broken])[:_REPLACEMENTS_TRIED].tolist():
            try:
                return self[position, index]
            except DatasetError as error:
                replaced.append(str(error))
        raise DatasetError(
            f"no image could be read in place of a broken one, the last said: {replaced[-1]}"
        )


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


class _AnnotatedSamples(_TestSamples):
    """The same with boxes and classes, for losses on images as they are tested."""

    def __init__(
        self, records: list[ImageRecord], short_edge: int, max_size: int, image_format: str
    ) -> None:
        super().__init__(records, short_edge, max_size, image_format)
        self.transform = TrainTransform(
            min_sizes=(short_edge,), max_size=max_size, sampling="choice", flip="none"
        )

    def __getitem__(self, reference: int) -> Sample:
        nothing_to_draw = np.random.default_rng(0)
        return _annotated_sample(
            self.records[reference], self.transform, self.image_format, nothing_to_draw
        )


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
    # np.array and not ascontiguousarray: always a writable copy, which torch asks for.
    channels_first = np.array(image.transpose(2, 0, 1), order="C")
    return {
        "image": torch.from_numpy(channels_first),
        "height": record.height,
        "width": record.width,
        "image_id": record.image_id,
        "file_name": record.file_name,
    }

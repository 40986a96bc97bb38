"""Builds loaders of batches, which are lists of sample dicts.

A sample holds ``image`` (uint8 ``[3, H, W]``, resized), ``height`` and ``width`` (of the original),
``image_id`` and ``file_name``; for training also ``gt_boxes`` (float32 ``[G, 4]``, XYXY in pixels
of the resized image) and ``gt_classes`` (int64 ``[G]``), without crowds, and with masks also
``gt_masks`` (length G, see ``cascade_det.masks.truth``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader

from cascade_det.data.augmentation import Augmentation
from cascade_det.data.coco import CocoDataset, ImageRecord, check_same_classes
from cascade_det.data.repeat_factors import Factors, repeat_factors
from cascade_det.data.sample_masks import MaskOptions, unpack
from cascade_det.data.sampler import TrainingBatchSampler, aspect_ratio_groups
from cascade_det.data.samples import (
    REPLACEMENTS_TRIED,
    Batch,
    DetectionSample,
    Fetched,
    MakeSample,
    Record,
    Sample,
    TestSamples,
    TrainingSamples,
    read_record,
)
from cascade_det.data.transforms import TrainTransform
from cascade_det.errors import DatasetError
from cascade_det.parallel.signals import obey_main_process, signals_held

logger = logging.getLogger(__name__)


class _HasSize(Protocol):
    """A record of an image."""

    @property
    def height(self) -> int:
        """Pixels."""

    @property
    def width(self) -> int:
        """Pixels."""


SizedRecord = TypeVar("SizedRecord", bound=_HasSize)


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
    masks: Mapping[str, str] | None = None,
    repeat: Mapping[str, Any] | None = None,
    augment: Mapping[str, Any] | None = None,
) -> DataLoader[Sample]:
    """Build an endless loader of training batches.

    Batch *i* depends only on the seed and *i*, not on the number of workers and processes or on
    where the loader started. Every ``iter()`` starts again at ``start_batch``.

    Args:
        datasets: one or more, with the same classes; their images are shuffled together.
        min_sizes: see :class:`TrainTransform`.
        max_size: see :class:`TrainTransform`.
        sampling: see :class:`TrainTransform`.
        flip: see :class:`TrainTransform`.
        image_format: ``"BGR"`` or ``"RGB"``.
        images_per_batch: images in every batch, over all processes.
        num_workers: reader processes; 0 reads in this one.
        aspect_ratio_grouping: whether landscape and portrait images go into separate batches.
        filter_empty: whether to leave out images without boxes, or with crowds only.
        seed: 0 or more.
        start_batch: number of the first batch, to resume a run.
        share: (rank, number of processes): this process gets the rank-th part of every batch.
        on_bad_data: for an image that proves broken when it is read: ``"error"`` raises;
            ``"skip"`` logs it, and takes another image that depends only on the seed and the
            position in the stream.
        masks: values of :class:`MaskOptions`, for data sets read with masks; ``None`` for samples
            without.
        repeat: ``threshold`` and ``square_root`` of :func:`repeat_factors`, to show images with
            rare classes more often; ``None`` shows every image once per epoch.
        augment: values of :func:`detection_sample`; ``None`` to resize and flip only.

    Raises:
        ConfigError: ``images_per_batch`` is not divisible by the number of processes.
        DatasetError: no image to train on, or different classes; while iterating, an image that
            cannot be read or does not have the size given in the json.
    """
    check_same_classes(datasets)
    records = training_records(datasets, filter_empty)
    make = detection_sample(
        records,
        min_sizes=min_sizes,
        max_size=max_size,
        sampling=sampling,
        flip=flip,
        image_format=image_format,
        masks=masks,
        augment=augment,
        tries=REPLACEMENTS_TRIED if on_bad_data == "skip" else 1,
    )
    factors = None
    if repeat is not None:
        factors = repeat_factors([record.classes for record in records], **repeat)
    return train_loader_of(
        records,
        make,
        images_per_batch=images_per_batch,
        num_workers=num_workers,
        aspect_ratio_grouping=aspect_ratio_grouping,
        seed=seed,
        start_batch=start_batch,
        share=share,
        on_bad_data=on_bad_data,
        factors=factors,
    )


def detection_sample(
    records: Sequence[ImageRecord],
    *,
    min_sizes: Sequence[int],
    max_size: int,
    sampling: str,
    flip: str,
    image_format: str,
    masks: Mapping[str, str] | None,
    augment: Mapping[str, Any] | None,
    tries: int = 1,
) -> DetectionSample:
    """What makes the samples of a training.

    Args:
        records: all training images.
        min_sizes: see :class:`TrainTransform`, as the three that follow.
        max_size: largest longer edge in pixels.
        sampling: ``"choice"`` or ``"range"``.
        flip: ``"horizontal"``, ``"vertical"`` or ``"none"``.
        image_format: ``"BGR"`` or ``"RGB"``.
        masks: values of :class:`MaskOptions`, or ``None``.
        augment: ``crop``, ``entries`` and ``boxes_of_masks`` of an :class:`Augmentation`, and
            ``resize``, whether images are resized at the end; or ``None``.
        tries: see :class:`Augmentation`.
    """
    augmentation = None
    if augment is not None:
        rest = dict(augment)
        if not rest.pop("resize"):
            min_sizes, sampling = (0,), "choice"
        read = partial(read_record, image_format=image_format)
        augmentation = Augmentation(records, read, image_format, **rest, tries=tries)
    return DetectionSample(
        TrainTransform(min_sizes=min_sizes, max_size=max_size, sampling=sampling, flip=flip),
        image_format,
        None if masks is None else MaskOptions(**masks),
        augmentation=augmentation,
    )


def train_loader_of(
    records: Sequence[SizedRecord],
    make: MakeSample[SizedRecord],
    *,
    images_per_batch: int,
    num_workers: int,
    aspect_ratio_grouping: bool,
    seed: int,
    start_batch: int,
    share: tuple[int, int],
    on_bad_data: str,
    factors: Factors | None = None,
) -> DataLoader[Sample]:
    """An endless loader of batches of the samples that ``make`` makes of one or more records.

    For ``factors`` see :class:`TrainingBatchSampler`, for the other arguments
    :func:`build_train_loader`.
    """
    sizes = [(record.height, record.width) for record in records]
    groups = aspect_ratio_groups(sizes) if aspect_ratio_grouping else [0] * len(sizes)
    return SampleLoader(
        TrainingSamples(records, make, seed, groups=groups, replace_broken=on_bad_data == "skip"),
        batch_sampler=TrainingBatchSampler(
            len(records),
            images_per_batch,
            seed=seed,
            groups=groups,
            factors=factors,
            start_batch=start_batch,
            share=share,
        ),
        **loader_arguments(num_workers),
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
    masks: Mapping[str, str] | None = None,
) -> DataLoader[Sample]:
    """Build a loader that yields every image once, by image id; the last batch may be shorter.

    Args:
        dataset: may be without annotations.
        min_sizes: one shorter edge in pixels; 0 for no resizing.
        max_size: largest longer edge in pixels.
        image_format: ``"BGR"`` or ``"RGB"``.
        images_per_batch: images in a batch of this process.
        num_workers: reader processes; 0 reads in this one.
        share: (rank, number of processes): this process gets the rank-th part of the images, as
            one contiguous piece, which may be empty.
        annotated: whether samples have ``gt_boxes``, ``gt_classes`` and masks as in training.
        masks: see :func:`build_train_loader`.

    Raises:
        DatasetError: while iterating, an image that cannot be read or does not have the size given
            in the json.
    """
    transform = TrainTransform(
        min_sizes=min_sizes, max_size=max_size, sampling="choice", flip="none"
    )
    mask_options = None if masks is None else MaskOptions(**masks)
    return SampleLoader(
        TestSamples(
            part_of(dataset.records, share),
            DetectionSample(transform, image_format, mask_options, annotated=annotated),
        ),
        batch_size=images_per_batch,
        **loader_arguments(num_workers),
    )


def training_records(datasets: Sequence[CocoDataset], filter_empty: bool) -> list[ImageRecord]:
    """The images to train on.

    Args:
        datasets: one or more.
        filter_empty: whether to leave out images without boxes, or with crowds only.

    Raises:
        DatasetError: no image has a box.
    """
    records = [record for dataset in datasets for record in dataset.records]
    with_boxes = [record for record in records if not record.iscrowd.all()]
    if not with_boxes:
        names = ", ".join(repr(dataset.source.name) for dataset in datasets)
        raise DatasetError(
            f"nothing to train on in {names or 'no data set'}: none of {len(records)} images has a "
            "box that is not a crowd"
        )
    return with_boxes if filter_empty else records


def part_of(records: Sequence[Record], share: tuple[int, int]) -> Sequence[Record]:
    """The contiguous part of (rank, number of processes); it may be empty."""
    rank, processes = share
    total = len(records)
    return records[total * rank // processes : total * (rank + 1) // processes]


def loader_arguments(num_workers: int) -> dict[str, Any]:
    """Arguments of a :class:`SampleLoader` with that many reader processes; 0 reads in this one."""
    return {
        "num_workers": num_workers,
        "collate_fn": _identity,
        "worker_init_fn": _init_worker if num_workers else None,
        # Without its own generator, iterating would advance the global one, which a resumed run
        # could not repeat.
        "generator": torch.Generator(),
    }


def _identity(fetched: Fetched) -> Fetched:
    return fetched


def _init_worker(worker: int) -> None:
    obey_main_process()


class SampleLoader(DataLoader[Sample]):
    """A DataLoader that reraises a worker's error unchanged, and logs in the main process.

    PyTorch would put the worker's whole traceback into the message.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        known: set[str] = set()
        for fetched in self._start():
            if fetched.error is not None:
                raise fetched.error
            for message in fetched.replaced:
                if message not in known:
                    known.add(message)
                    logger.warning(
                        "%s. Training on another image instead (broken images so far: %d)",
                        message,
                        len(known),
                    )
            for sample in fetched.batch:
                if "gt_masks" in sample:
                    sample["gt_masks"] = unpack(sample["gt_masks"])
            yield fetched.batch

    def _start(self) -> Iterator[Fetched]:
        with signals_held():
            return super().__iter__()

"""Builds loaders of batches for semantic segmentation, which are lists of sample dicts.

A sample holds ``image`` (``[3, H, W]``, resized, channels in the order of ``image_format``),
``height`` and ``width`` (of the original), ``image_id``, ``file_name``, ``sem_seg_file_name`` if
the labels are an image, and, where annotated, ``sem_seg`` (int64 ``[H, W]``, resized).

``image`` is uint8, as for detection, if it comes from a file of pixels. An array file of numbers in
[0, 1] gives float32 in 0..255, three equal channels: the same ``PIXEL_MEAN`` and ``PIXEL_STD`` fit
both, a network takes both, and 8 bits would merge grey levels that a CT tells apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader

from cascade_det.data.loader import SampleLoader, loader_arguments, part_of, train_loader_of
from cascade_det.data.samples import Sample, TestSamples
from cascade_det.data.semantic.dataset import SemanticDataset, check_same_semantic_classes
from cascade_det.data.semantic.reading import SemanticRecord, pixels_of, read_pair
from cascade_det.data.semantic.transforms import SemanticTransform
from cascade_det.data.transforms import TrainTransform
from cascade_det.errors import DatasetError


class SemanticSample:
    """Makes the sample of a record."""

    def __init__(
        self, transform: SemanticTransform, image_format: str, *, annotated: bool = True
    ) -> None:
        self.transform = transform
        self.image_format = image_format
        self.annotated = annotated

    def __call__(self, record: SemanticRecord, generator: np.random.Generator) -> Sample:
        """Read and transform an image and its labels, with randomness from ``generator``."""
        image, labels = read_pair(record, self.image_format)
        image, labels = self.transform(image, labels, generator)
        sample: Sample = {
            "image": torch.from_numpy(pixels_of(image)),
            "height": record.height,
            "width": record.width,
            "image_id": record.image_id,
            "file_name": record.file_name,
        }
        if record.label_file:
            sample["sem_seg_file_name"] = record.label_file
        if self.annotated:
            sample["sem_seg"] = torch.from_numpy(labels.astype(np.int64, order="C"))
        return sample


def build_semantic_train_loader(
    datasets: Sequence[SemanticDataset],
    *,
    min_sizes: Sequence[int],
    max_size: int,
    sampling: str,
    flip: str,
    augmentation: str,
    image_format: str,
    images_per_batch: int,
    num_workers: int,
    aspect_ratio_grouping: bool,
    seed: int,
    start_batch: int = 0,
    share: tuple[int, int] = (0, 1),
    on_bad_data: str = "error",
) -> DataLoader[Sample]:
    """Build an endless loader of training batches, as ``data.loader.build_train_loader``.

    Batch *i* depends only on the seed and *i*, not on the number of workers and processes or on
    where the loader started.

    Args:
        datasets: one or more, with the same classes; their images are shuffled together.
        min_sizes: see :class:`TrainTransform`, as the two that follow.
        max_size: largest longer edge in pixels.
        sampling: ``"choice"`` or ``"range"``.
        flip: ``"horizontal"``, ``"vertical"`` or ``"none"``, for the augmentation "flip".
        augmentation: one of ``AUGMENTATIONS``, see :class:`SemanticTransform`.
        image_format: ``"BGR"`` or ``"RGB"``.
        images_per_batch: images in every batch, over all processes.
        num_workers: reader processes; 0 reads in this one.
        aspect_ratio_grouping: whether landscape and portrait images go into separate batches.
        seed: 0 or more.
        start_batch: number of the first batch, to resume a run.
        share: (rank, number of processes): this process gets the rank-th part of every batch.
        on_bad_data: for an image that proves broken when it is read: ``"error"`` raises;
            ``"skip"`` logs it and takes another.

    Raises:
        ConfigError: ``images_per_batch`` is not divisible by the number of processes.
        DatasetError: no image, or different classes; while iterating, a file that cannot be read.
    """
    check_same_semantic_classes(datasets)
    records = [record for dataset in datasets for record in dataset.records]
    if not records:
        raise DatasetError("there is no image to train on")
    resize = TrainTransform(
        min_sizes=min_sizes,
        max_size=max_size,
        sampling=sampling,
        flip=flip if augmentation == "flip" else "none",
    )
    return train_loader_of(
        records,
        SemanticSample(SemanticTransform(resize, augmentation), image_format),
        images_per_batch=images_per_batch,
        num_workers=num_workers,
        aspect_ratio_grouping=aspect_ratio_grouping,
        seed=seed,
        start_batch=start_batch,
        share=share,
        on_bad_data=on_bad_data,
    )


def build_semantic_test_loader(
    dataset: SemanticDataset,
    *,
    min_sizes: Sequence[int],
    max_size: int,
    image_format: str,
    images_per_batch: int,
    num_workers: int,
    share: tuple[int, int] = (0, 1),
    annotated: bool = False,
) -> DataLoader[Sample]:
    """Build a loader that yields every image once, by image id; the last batch may be shorter.

    The truth at the size of the original image is ``read_labels(dataset.records[image_id])``.

    Args:
        dataset: from ``load_semantic_dataset``.
        min_sizes: one shorter edge in pixels; 0 for no resizing.
        max_size: largest longer edge in pixels.
        image_format: ``"BGR"`` or ``"RGB"``.
        images_per_batch: images in a batch of this process.
        num_workers: reader processes; 0 reads in this one.
        share: (rank, number of processes): this process gets the rank-th part of the images, as
            one contiguous piece, which may be empty.
        annotated: whether samples have ``sem_seg`` as in training.

    Raises:
        DatasetError: while iterating, a file that cannot be read.
    """
    resize = TrainTransform(min_sizes=min_sizes, max_size=max_size, sampling="choice", flip="none")
    make = SemanticSample(SemanticTransform(resize, "flip"), image_format, annotated=annotated)
    return SampleLoader(
        TestSamples(part_of(dataset.records, share), make),
        batch_size=images_per_batch,
        **loader_arguments(num_workers),
    )

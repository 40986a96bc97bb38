"""Which images make up training batch *i*: a pure function of the seed and *i*."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from cascade_det.errors import ConfigError

# A place in the stream of images, and the index of the image that stands there.
SampleReference = tuple[int, int]

# What a generator is for. Without them epoch 7 and image 7 would draw the same numbers.
_SHUFFLE, _AUGMENT, _REPLACE = 0, 1, 2


class TrainingBatchSampler(Sampler[list[SampleReference]]):
    """An endless stream of batches, each a list of (position in the stream, image index).

    The stream is one shuffled epoch after another, with every image once in each. With groups, an
    image waits until its group fills a batch, across the end of an epoch if need be, so a batch
    holds one group only; none is lost. Iterating again starts again at ``start_batch``.

    A batch is the batch of the whole run: processes that train together each take their part of
    every batch, which keeps the run independent of their number.
    """

    def __init__(
        self,
        num_images: int,
        images_per_batch: int,
        *,
        seed: int,
        groups: Sequence[int] | None = None,
        start_batch: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Describe the stream.

        Args:
            num_images: images are ``0 .. num_images - 1``.
            images_per_batch: length of every batch, over all processes.
            seed: 0 or more.
            groups: the group of each image, or None for one group.
            start_batch: number of the first batch; those before it are passed over without
                reading an image.
            share: (rank, number of processes); only the rank-th part of every batch is given.

        Raises:
            ConfigError: the processes cannot share a batch evenly.
            ValueError: a number out of range, or not one group per image.
        """
        if num_images < 1 or images_per_batch < 1:
            raise ValueError("num_images and images_per_batch must be 1 or more")
        if seed < 0 or start_batch < 0:
            raise ValueError("seed and start_batch must be 0 or more")
        if groups is not None and len(groups) != num_images:
            raise ValueError(f"{len(groups)} groups for {num_images} images")
        rank, processes = share
        if images_per_batch % processes:
            raise ConfigError(
                f"SOLVER.IMS_PER_BATCH is {images_per_batch}, which {processes} processes cannot "
                f"share evenly: set a multiple of {processes}"
            )
        part = images_per_batch // processes
        self.part = slice(rank * part, (rank + 1) * part)
        self.num_images = num_images
        self.images_per_batch = images_per_batch
        self.seed = seed
        self.groups = groups
        self.start_batch = start_batch

    def __iter__(self) -> Iterator[list[SampleReference]]:
        """This process's parts of the batches from ``start_batch`` on, without end."""
        for batch in itertools.islice(self._batches(), self.start_batch, None):
            yield batch[self.part]

    def _batches(self) -> Iterator[list[SampleReference]]:
        waiting: defaultdict[int, list[SampleReference]] = defaultdict(list)
        for position, index in enumerate(self._stream()):
            group = 0 if self.groups is None else self.groups[index]
            waiting[group].append((position, index))
            if len(waiting[group]) == self.images_per_batch:
                yield waiting.pop(group)

    def _stream(self) -> Iterator[int]:
        for epoch in itertools.count():
            generator = np.random.default_rng([self.seed, _SHUFFLE, epoch])
            yield from generator.permutation(self.num_images).tolist()


def augmentation_generator(seed: int, position: int) -> np.random.Generator:
    """The source of all chance in the sample at this position of the stream."""
    return np.random.default_rng([seed, _AUGMENT, position])


def replacement_generator(seed: int, position: int) -> np.random.Generator:
    """The source of chance in what stands in for a broken image at this position."""
    return np.random.default_rng([seed, _REPLACE, position])


def aspect_ratio_groups(sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Group 0 for landscape, 1 for portrait and square: less padding in a batch.

    Args:
        sizes: (height, width) of each image.
    """
    return [0 if width > height else 1 for height, width in sizes]

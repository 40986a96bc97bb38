"""Selects the images of training batch *i*: a pure function of the seed and *i*."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from cascade_det.data.repeat_factors import Factors, repeated
from cascade_det.errors import ConfigError

# (position in the stream of images, index of the image at that position)
SampleReference = tuple[int, int]

# Purposes of generators, so that epoch 7 and image 7 draw different numbers.
_SHUFFLE, _AUGMENT, _REPLACE, _REPEAT = 0, 1, 2, 3


class TrainingBatchSampler(Sampler[list[SampleReference]]):
    """An endless stream of batches, each a list of (position in the stream, image index).

    The stream is a sequence of shuffled epochs, each with every image once, or as often as its
    repeat factor says. With groups, an image waits until its group fills a batch, across the end of
    an epoch if necessary, so a batch has images of one group and none is lost. Iterating again
    restarts at ``start_batch``.

    Batches are those of the whole run: each of several processes takes its part of every batch, so
    the run does not depend on their number.
    """

    def __init__(
        self,
        num_images: int,
        images_per_batch: int,
        *,
        seed: int,
        groups: Sequence[int],
        factors: Factors | None = None,
        start_batch: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Create the stream.

        Args:
            num_images: images are ``0 .. num_images - 1``.
            images_per_batch: length of every batch, over all processes.
            seed: 0 or more.
            groups: the group of each image.
            factors: how often an epoch has each image, on average; ``None`` for once.
            start_batch: number of the first batch; earlier ones are skipped without reading an
                image.
            share: (rank, number of processes); yields only the rank-th part of every batch.

        Raises:
            ConfigError: the batch size is not divisible by the number of processes.
        """
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
        self.factors = factors
        self.start_batch = start_batch

    def __iter__(self) -> Iterator[list[SampleReference]]:
        """This process' parts of the batches from ``start_batch`` on, endlessly."""
        for batch in itertools.islice(self._batches(), self.start_batch, None):
            yield batch[self.part]

    def _batches(self) -> Iterator[list[SampleReference]]:
        waiting: defaultdict[int, list[SampleReference]] = defaultdict(list)
        for position, index in enumerate(self._stream()):
            group = self.groups[index]
            waiting[group].append((position, index))
            if len(waiting[group]) == self.images_per_batch:
                yield waiting.pop(group)

    def _stream(self) -> Iterator[int]:
        for epoch in itertools.count():
            generator = np.random.default_rng([self.seed, _SHUFFLE, epoch])
            images = np.arange(self.num_images)
            if self.factors is not None:
                rounding = np.random.default_rng([self.seed, _REPEAT, epoch])
                images = repeated(self.factors, rounding)
            yield from images[generator.permutation(len(images))].tolist()


def augmentation_generator(seed: int, position: int) -> np.random.Generator:
    """The generator for the augmentation of the sample at this position of the stream."""
    return np.random.default_rng([seed, _AUGMENT, position])


def replacement_generator(seed: int, position: int) -> np.random.Generator:
    """The generator that draws a replacement for a broken image at this position."""
    return np.random.default_rng([seed, _REPLACE, position])


def aspect_ratio_groups(sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Group 0 for landscape, 1 for portrait and square images, for less padding in a batch.

    Args:
        sizes: (height, width) of each image.
    """
    return [0 if width > height else 1 for height, width in sizes]

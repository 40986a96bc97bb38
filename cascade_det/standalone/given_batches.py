"""Batches of the images that callers pass to a predictor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike

import numpy as np
import torch
from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.data.given_images import Image, Images, check_images, given_pixels
from cascade_det.data.read_ahead import read_ahead
from cascade_det.data.samples import Sample
from cascade_det.data.transforms import resize_shortest_edge


class GivenBatches:
    """Reads and resizes images as evaluation does, a batch ahead.

    Args:
        cfg: has ``INPUT.MIN_SIZE_TEST``, ``MAX_SIZE_TEST`` and ``FORMAT``, and
            ``CASCADE.TEST_IMS_PER_BATCH``.

    Attributes:
        batch_size: images per batch.
    """

    def __init__(self, cfg: CfgNode) -> None:
        arguments = config.input_arguments(cfg, train=False)
        self._format = arguments["image_format"]
        self._short_edge = arguments["min_sizes"][0]
        self._max_size = arguments["max_size"]
        self.batch_size: int = config.test_loader_arguments(cfg)["images_per_batch"]

    def __call__(self, images: Images, names: Sequence[str] | None) -> Iterator[list[Sample]]:
        """Samples in the order of the images, batch by batch.

        Args:
            images: a list or tuple, see ``data.given_images.check_images``.
            names: one per image for ``file_name``; by default its path, or ``None`` of an array.

        Raises:
            ValueError: an image is something else; at the first batch, as the error below.
            DatasetError: a file is missing or not an image.
        """
        checked = check_images(images, names)
        paths = [str(i) if isinstance(i, (str, PathLike)) else None for i in checked]
        named = list(zip(checked, paths if names is None else names, strict=True))
        parts = [named[i : i + self.batch_size] for i in range(0, len(named), self.batch_size)]
        yield from read_ahead(self._read_batch, parts)

    def _read_batch(self, named: Sequence[tuple[Image, str | None]]) -> list[Sample]:
        return [self._read_sample(image, name) for image, name in named]

    def _read_sample(self, image: Image, name: str | None) -> Sample:
        pixels = given_pixels(image, self._format)
        height, width = pixels.shape[:2]
        resized = resize_shortest_edge(pixels, self._short_edge, self._max_size)
        tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        return {"image": tensor, "height": height, "width": width, "file_name": name}

"""The augmentation of a training image: a crop, then the entries of ``CASCADE.AUGMENT``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from cascade_det.data.augment_mixing import MIXES, Mix, build_mix
from cascade_det.data.augment_transforms import Apply, build_transform
from cascade_det.data.coco import ImageRecord
from cascade_det.data.random_crop import RandomCrop
from cascade_det.data.scene import Scene
from cascade_det.data.transforms import Pixels
from cascade_det.errors import DatasetError

# Reads the image of a record, uint8 [H, W, 3]; may raise a DatasetError.
Read = Callable[[ImageRecord], Pixels]


class Augmentation:
    """Augments images, with randomness from the generator of each sample alone."""

    def __init__(
        self,
        records: Sequence[ImageRecord],
        read: Read,
        image_format: str,
        *,
        crop: tuple[str, tuple[float, float]] | None,
        entries: Sequence[tuple[str, dict[str, Any]]],
        boxes_of_masks: bool,
        tries: int = 1,
    ) -> None:
        """Build the entries.

        Args:
            records: the training images, of which copy-paste and mosaic take others.
            read: reads one of them.
            image_format: ``"BGR"`` or ``"RGB"``, the channels of images.
            crop: type and size, see :class:`RandomCrop`; ``None`` for no crop.
            entries: name and arguments of each, checked.
            boxes_of_masks: whether the boxes of the result follow from its masks, as entries may
                cut or turn objects.
            tries: how many other images are drawn until one can be read.
        """
        self.records = records
        self.read = read
        self.image_format = image_format
        self.crop = None if crop is None else RandomCrop(*crop)
        self.entries: list[Mix] = [
            build_mix(name, arguments)
            if name in MIXES
            else partial(_alone, build_transform(name, arguments))
            for name, arguments in entries
        ]
        self.boxes_of_masks = boxes_of_masks
        self.tries = tries

    def __call__(self, image: Pixels, record: ImageRecord, generator: np.random.Generator) -> Scene:
        """Augment the image of a record, with randomness from ``generator``."""
        with _torch_seeded_by(generator):
            return self._augmented(image, record, len(self.entries), generator)

    def _augmented(
        self, image: Pixels, record: ImageRecord, count: int, generator: np.random.Generator
    ) -> Scene:
        """The scene after the crop and the first ``count`` entries."""
        scene = Scene.of(image, self.image_format, record)
        if self.crop is not None:
            scene = scene.cropped(*self.crop(*scene.size, generator))
        for number, entry in enumerate(self.entries[:count]):
            # What is pasted has been through the same entries: both images are jittered, as in
            # Simple Copy-Paste.
            scene = entry(scene, partial(self._other, number, generator))
        return scene

    def _other(self, count: int, generator: np.random.Generator) -> Scene:
        """Another image after the first ``count`` entries."""
        for _ in range(self.tries - 1):
            record = self._draw(generator)
            try:
                return self._augmented(self.read(record), record, count, generator)
            except DatasetError:  # logged where it is the image of a sample itself
                continue
        record = self._draw(generator)
        return self._augmented(self.read(record), record, count, generator)

    def _draw(self, generator: np.random.Generator) -> ImageRecord:
        return self.records[int(generator.integers(len(self.records)))]


def _alone(apply: Apply, scene: Scene, other: object) -> Scene:
    return apply(scene)


@contextmanager
def _torch_seeded_by(generator: np.random.Generator) -> Iterator[None]:
    """Let torch's global CPU generator, which torchvision draws from, continue another one."""
    # Not torch.manual_seed, which would seed GPUs as well.
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(int(generator.integers(2**63)))
    try:
        yield
    finally:
        torch.set_rng_state(state)

"""Reads and transforms samples for training and testing, in the workers of a loader."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from cascade_det.data.augmentation import Augmentation
from cascade_det.data.coco import ImageRecord
from cascade_det.data.sample_masks import MaskOptions, boxes_of_masks, pack, place_masks
from cascade_det.data.sampler import SampleReference, augmentation_generator, replacement_generator
from cascade_det.data.scene import SceneMask
from cascade_det.data.transforms import Boxes, Pixels, Placement, TrainTransform, read_image
from cascade_det.errors import DatasetError
from cascade_det.masks.segmentation import Segmentation

Sample = dict[str, Any]
Batch = list[Sample]

# This many broken images in a row suggest another cause, such as an unmounted disk.
REPLACEMENTS_TRIED = 20


class Fetched(NamedTuple):
    """The result of a worker: a batch, or the error that ends the loading."""

    batch: Batch
    # Messages about broken images that were replaced in the batch.
    replaced: list[str]
    error: DatasetError | None = None


class _Objects(NamedTuple):
    """The objects of an image, without crowds: boxes ``[G, 4]``, classes ``[G]`` and masks."""

    boxes: npt.NDArray[np.floating[Any]]
    classes: npt.NDArray[np.int64]
    masks: Sequence[Segmentation | SceneMask] | None


class DetectionSample:
    """Makes the sample of an image with its objects.

    It has masks if there are options for them, and no objects unless ``annotated``.
    """

    def __init__(
        self,
        transform: TrainTransform,
        image_format: str,
        masks: MaskOptions | None = None,
        *,
        annotated: bool = True,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.transform = transform
        self.image_format = image_format
        self.masks = masks if annotated else None
        self.annotated = annotated
        self.augmentation = augmentation

    def __call__(self, record: ImageRecord, generator: np.random.Generator) -> Sample:
        """Read, augment, resize and flip an image, with randomness from ``generator``."""
        image = read_record(record, self.image_format)
        objects = _objects_of(record)
        if self.augmentation is not None:
            scene = self.augmentation(image, record, generator)
            image = scene.pixels(self.image_format)
            objects = _Objects(scene.boxes, scene.classes, scene.masks)
        image, placement = self.transform.place(image, generator)
        # np.array, unlike ascontiguousarray, always makes a writable copy, as torch requires.
        channels_first = np.array(image.transpose(2, 0, 1), order="C")
        return {
            "image": torch.from_numpy(channels_first),
            "height": record.height,
            "width": record.width,
            "image_id": record.image_id,
            "file_name": record.file_name,
            **(self._truth(objects, placement) if self.annotated else {}),
        }

    def _truth(self, objects: _Objects, placement: Placement) -> dict[str, Any]:
        boxes, keep = placement.boxes(objects.boxes)
        if self.masks is None:
            return _truth(boxes, objects.classes, keep)
        assert objects.masks is not None
        masks, is_known = place_masks(objects.masks, placement, self.masks)
        keep &= is_known
        if self.augmentation is not None and self.augmentation.boxes_of_masks:
            boxes, is_box = boxes_of_masks(boxes, masks)
            keep &= is_box
        return {
            **_truth(boxes, objects.classes, keep),
            "gt_masks": [mask for mask, kept in zip(masks, keep, strict=True) if kept],
        }


def _objects_of(record: ImageRecord) -> _Objects:
    keep = ~record.iscrowd
    masks = None if record.masks is None else list(itertools.compress(record.masks, keep))
    return _Objects(record.boxes[keep], record.classes[keep], masks)


def _truth(
    boxes: Boxes, classes: npt.NDArray[np.int64], keep: npt.NDArray[np.bool_]
) -> dict[str, Any]:
    return {
        "gt_boxes": torch.from_numpy(boxes[keep]),
        "gt_classes": torch.from_numpy(classes[keep]),
    }


Record = TypeVar("Record")
# What makes a sample of a record, with randomness from the generator; may raise a DatasetError.
MakeSample = Callable[[Record, np.random.Generator], Sample]


class _Samples(Dataset[Sample], Generic[Record]):
    """Makes samples, a batch at a time; a ``DatasetError`` is returned to the loader.

    The masks of a batch are packed.
    """

    def __init__(self, records: Sequence[Record], make: MakeSample[Record]) -> None:
        self.records = records
        self.make = make

    def __len__(self) -> int:
        return len(self.records)

    def __getitems__(self, references: list[Any]) -> Fetched:
        replaced: list[str] = []
        try:
            batch = [self._get(reference, replaced) for reference in references]
        except DatasetError as error:
            return Fetched([], replaced, error)
        for sample in batch:
            if "gt_masks" in sample:
                sample["gt_masks"] = pack(sample["gt_masks"])
        return Fetched(batch, replaced)

    def _get(self, reference: Any, replaced: list[str]) -> Sample:
        return self[reference]


class TrainingSamples(_Samples[Record]):
    """Augmented samples by (position in the stream, index of the record)."""

    def __init__(
        self,
        records: Sequence[Record],
        make: MakeSample[Record],
        seed: int,
        *,
        groups: Sequence[int],
        replace_broken: bool,
    ) -> None:
        super().__init__(records, make)
        self.seed = seed
        self.groups = np.asarray(groups)
        self.replace_broken = replace_broken

    def __getitem__(self, reference: SampleReference) -> Sample:
        position, index = reference
        return self.make(self.records[index], augmentation_generator(self.seed, position))

    def _get(self, reference: SampleReference, replaced: list[str]) -> Sample:
        try:
            return self[reference]
        except DatasetError as error:
            if not self.replace_broken:
                raise
            replaced.append(str(error))
            return self._replacement(reference, replaced)

    def _replacement(self, reference: SampleReference, replaced: list[str]) -> Sample:
        """The first readable image among random ones of the same group."""
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


class TestSamples(_Samples[Record]):
    """Samples by index of the record, made without randomness: one size, no flip."""

    def __getitem__(self, reference: int) -> Sample:
        return self.make(self.records[reference], np.random.default_rng(0))


def read_record(record: ImageRecord, image_format: str) -> Pixels:
    """The image of a record, see :func:`read_image`.

    Raises:
        DatasetError: it cannot be read, or does not have the size given in the json.
    """
    image = read_image(record.file_name, image_format)
    height, width = image.shape[:2]
    if (height, width) != (record.height, record.width):
        raise DatasetError(
            f"{record.file_name}: the image is {width}x{height} pixels (width x height, upright), "
            f"but the json says {record.width}x{record.height} for image {record.image_id}. "
            "Correct the json: its boxes would be in the wrong place."
        )
    return image

"""Reads and transforms samples for training and testing, in the workers of a loader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from cascade_det.data.coco import ImageRecord
from cascade_det.data.sample_masks import MaskOptions, pack, place_masks
from cascade_det.data.sampler import SampleReference, augmentation_generator, replacement_generator
from cascade_det.data.transforms import Pixels, TrainTransform, read_image
from cascade_det.errors import DatasetError

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


class _Samples(Dataset[Sample]):
    """Makes samples, a batch at a time; a ``DatasetError`` is returned to the loader.

    Samples have masks if there are options for them. Those of a batch are packed.
    """

    def __init__(
        self,
        records: list[ImageRecord],
        transform: TrainTransform,
        image_format: str,
        masks: MaskOptions | None,
    ) -> None:
        self.records = records
        self.transform = transform
        self.image_format = image_format
        self.masks = masks

    def __len__(self) -> int:
        return len(self.records)

    def __getitems__(self, references: list[Any]) -> Fetched:
        replaced: list[str] = []
        try:
            batch = [self._make(reference, replaced) for reference in references]
        except DatasetError as error:
            return Fetched([], replaced, error)
        for sample in batch:
            if "gt_masks" in sample:
                sample["gt_masks"] = pack(sample["gt_masks"])
        return Fetched(batch, replaced)

    def _make(self, reference: Any, replaced: list[str]) -> Sample:
        return self[reference]

    def _sample(self, record: ImageRecord, generator: np.random.Generator) -> Sample:
        image, placement = self.transform.place(_read(record, self.image_format), generator)
        boxes, is_box = placement.boxes(record.boxes)
        kept = np.flatnonzero(is_box & ~record.iscrowd)
        truth: dict[str, Any] = {}
        if self.masks is not None:
            assert record.masks is not None
            masks = [record.masks[index] for index in kept]
            placed, is_known = place_masks(masks, placement, self.masks)
            kept = kept[is_known]
            truth["gt_masks"] = [m for m, known in zip(placed, is_known, strict=True) if known]
        # np.array, unlike ascontiguousarray, always makes a writable copy, as torch requires.
        channels_first = np.array(image.transpose(2, 0, 1), order="C")
        return {
            "image": torch.from_numpy(channels_first),
            "height": record.height,
            "width": record.width,
            "image_id": record.image_id,
            "file_name": record.file_name,
            "gt_boxes": torch.from_numpy(boxes[kept]),
            "gt_classes": torch.from_numpy(record.classes[kept]),
            **truth,
        }


class TrainingSamples(_Samples):
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
        masks: MaskOptions | None = None,
    ) -> None:
        super().__init__(records, transform, image_format, masks)
        self.seed = seed
        self.groups = np.asarray(groups)
        self.replace_broken = replace_broken

    def __getitem__(self, reference: SampleReference) -> Sample:
        position, index = reference
        return self._sample(self.records[index], augmentation_generator(self.seed, position))

    def _make(self, reference: SampleReference, replaced: list[str]) -> Sample:
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


class TestSamples(_Samples):
    """Resized samples by index of the image, with their objects where ``annotated``."""

    def __init__(
        self,
        records: list[ImageRecord],
        transform: TrainTransform,
        image_format: str,
        *,
        annotated: bool,
        masks: MaskOptions | None = None,
    ) -> None:
        super().__init__(records, transform, image_format, masks if annotated else None)
        self.annotated = annotated

    def __getitem__(self, reference: int) -> Sample:
        unused = np.random.default_rng(0)  # one size, no flip
        sample = self._sample(self.records[reference], unused)
        if not self.annotated:
            del sample["gt_boxes"], sample["gt_classes"]
        return sample


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

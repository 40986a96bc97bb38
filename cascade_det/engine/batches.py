"""Checks of batches, and the equal parts that a step computes them in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cascade_det.data.samples import Batch

# Per image; memory grows with these times the anchors.
_MOST_OBJECTS = 10_000
_FARTHEST = 1e5  # pixels, of a box or polygon where there are masks: nothing draws farther


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """Split a batch into equal parts, in order.

    Raises:
        ValueError: its size is not a multiple of ``parts``.
    """
    if parts < 1 or len(batch) % parts:
        raise ValueError(f"{len(batch)} images cannot be computed in {parts} equal parts")
    size = len(batch) // parts
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def check_images(batch: Sequence[Mapping[str, Any]], channels: int | None = 3) -> None:
    """Check the images of a batch.

    Args:
        batch: samples.
        channels: of each image; ``None`` for any number.

    Raises:
        ValueError: an image is not a tensor ``[channels, H, W]`` or has no pixels, or the batch is
            not a list of dicts.
    """
    if isinstance(batch, Mapping):
        raise ValueError("a batch is a list of samples, not one alone")
    for index, sample in enumerate(batch):
        if not isinstance(sample, Mapping):
            raise ValueError(
                f"image {index} of the batch is {type(sample).__name__}: give a dict with the "
                "tensor as 'image'"
            )
        image = sample.get("image")
        shape = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        is_image = isinstance(shape, list) and len(shape) == 3 and 0 not in shape
        if not is_image or shape[0] != (channels or shape[0]):
            raise ValueError(
                f"image {index} of the batch is {shape}: give a uint8 tensor "
                f"[{channels or 'C'}, H, W] with at least one pixel"
            )


def check_truth(batch: Sequence[Mapping[str, Any]], num_classes: int) -> None:
    """Check the ground truth of a batch, where it has some.

    Raises:
        ValueError: boxes are not ``[G, 4]``, classes not int64 ``[G]`` in ``[0, num_classes)``, G
            is beyond any image, or masks are not G of :mod:`cascade_det.masks.truth`.
    """
    for index, sample in enumerate(batch):
        if "gt_boxes" not in sample and "gt_classes" not in sample:
            continue
        boxes, classes = sample.get("gt_boxes"), sample.get("gt_classes")
        if not isinstance(boxes, Tensor) or not isinstance(classes, Tensor):
            raise ValueError(
                f"image {index} of the batch has gt_boxes or gt_classes that are not tensors"
            )
        is_fine = (
            boxes.is_floating_point()
            and boxes.shape == (len(boxes), 4)
            and classes.shape == (len(boxes),)
            # Some mappers give float classes to an image without objects.
            and (classes.dtype in (torch.int64, torch.int32) or not len(classes))
        )
        if not is_fine or len(boxes) > _MOST_OBJECTS:
            raise ValueError(
                f"the objects of image {index} of the batch are not boxes [G, 4] and as many "
                f"classes, {_MOST_OBJECTS:,} at most"
            )
        if ((classes < 0) | (classes >= num_classes)).any():
            raise ValueError(f"image {index} of the batch has classes beyond the {num_classes}")
        if "gt_masks" in sample and not _are_masks(sample["gt_masks"], boxes, sample["image"]):
            raise ValueError(
                f"the masks of image {index} of the batch are not one for each box: polygons, a "
                "bitmap of the image's size or None"
            )


def check_labels(batch: Sequence[Mapping[str, Any]], num_classes: int, ignore_value: int) -> None:
    """Check the labels of a batch for semantic segmentation.

    Raises:
        ValueError: they are not int64 ``[H, W]`` as the image, of classes or the ignored value.
    """
    for index, sample in enumerate(batch):
        labels, size = sample.get("sem_seg"), sample["image"].shape[-2:]
        if (
            not isinstance(labels, Tensor)
            or labels.dtype != torch.int64
            or labels.shape != size
            or (((labels < 0) | (labels >= num_classes)) & (labels != ignore_value)).any()
        ):
            raise ValueError(
                f"the labels of image {index} of the batch are not int64 {list(size)}, from 0 to "
                f"{num_classes - 1} or {ignore_value}"
            )


def is_mask(mask: Any, size: tuple[int, ...]) -> bool:
    """Whether this is a bitmap of ``size`` (height, width) or polygons; drawing does not check."""
    if isinstance(mask, Tensor):
        return mask.dtype == torch.bool and mask.shape == size
    return isinstance(mask, list) and len(mask) > 0 and all(map(_is_polygon, mask))


def _is_polygon(points: Any) -> bool:
    """Whether these are x, y, x, y, ... of at least three points."""
    return (
        isinstance(points, Tensor)
        and points.is_floating_point()
        and points.dim() == 1
        and len(points) >= 6
        and len(points) % 2 == 0
        and bool((points.abs() <= _FARTHEST).all())  # False for NaN
    )


def _are_masks(masks: Any, boxes: Tensor, image: Tensor) -> bool:
    return (
        isinstance(masks, (list, Tensor))
        and len(masks) == len(boxes)
        and all(mask is None or is_mask(mask, image.shape[-2:]) for mask in masks)
        and bool((boxes.abs() <= _FARTHEST).all())
    )

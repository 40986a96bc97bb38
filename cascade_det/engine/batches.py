"""Batches of training, and the parts that they are computed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

Batch = list[dict[str, Any]]


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """A batch in equal parts, in order.

    Raises:
        ValueError: it cannot be shared equally.
    """
    if parts < 1 or len(batch) % parts:
        raise ValueError(f"{len(batch)} images cannot be computed in {parts} equal parts")
    size = len(batch) // parts
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def check_images(batch: Sequence[Mapping[str, Any]], channels: int | None = 3) -> None:
    """Make sure that the images of a batch are what a detector takes.

    Args:
        batch: samples.
        channels: of an image; ``None`` for any number.

    Raises:
        ValueError: one is no tensor ``[channels, H, W]``, or has no pixel.
    """
    for place, sample in enumerate(batch):
        image = sample.get("image")
        shape = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        is_image = isinstance(shape, list) and len(shape) == 3 and 0 not in shape
        if not is_image or shape[0] != (channels or shape[0]):
            raise ValueError(
                f"image {place} of the batch is {shape}: give a uint8 tensor "
                f"[{channels or 'C'}, H, W] with at least one pixel"
            )

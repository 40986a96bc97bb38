"""Images that callers pass to a predictor: paths, or arrays of pixels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade_det.data.transforms import Pixels, read_image

Image = npt.NDArray[np.uint8] | str | os.PathLike[str]
Images = list[Image] | tuple[Image, ...]

_WANTED = "a uint8 array [H, W, 3] in BGR order, or the path of a file"


def check_images(images: Any, names: Sequence[str] | None = None) -> list[Image]:
    """Check all images before detection starts.

    Args:
        images: a list or tuple of images, see :func:`given_pixels`.
        names: one per image, or ``None``.

    Raises:
        ValueError: another type or shape; the message says what is expected.
    """
    if not isinstance(images, list | tuple):
        raise ValueError(f"images are {_WANTED}, or a list of these, not {_kind(images)}")
    for image in images:
        _check_image(image)
    if names is not None and len(names) != len(images):
        raise ValueError(f"there are {len(images)} images, but {len(names)} names")
    return list(images)


def given_pixels(image: Image, image_format: str) -> Pixels:
    """The pixels of an image from ``check_images``, uint8 ``[H, W, 3]``.

    Args:
        image: uint8 ``[H, W, 3]`` in BGR order, as OpenCV reads it, or the path of a file.
        image_format: ``"BGR"`` or ``"RGB"``, the channel order of the result.

    Raises:
        DatasetError: the file is missing or not an image.
    """
    if not isinstance(image, np.ndarray):
        return read_image(os.fspath(image), image_format)
    return image if image_format == "BGR" else image[:, :, ::-1]


def _check_image(image: Any) -> None:
    if isinstance(image, str | os.PathLike):
        return
    if not isinstance(image, np.ndarray):
        raise ValueError(f"an image is {_WANTED}, not {_kind(image)}")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"an image is {_WANTED}, not {image.dtype} {list(image.shape)}")
    if image.size == 0:
        raise ValueError(f"an image of shape {list(image.shape)} has no pixels")


def _kind(value: Any) -> str:
    """The type of a value, and how to convert common types to an image."""
    name = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if name.startswith("PIL."):
        return f"{name}: give np.asarray(image.convert('RGB'))[:, :, ::-1]"
    if name.startswith("torch."):
        return f"{name}: give its numpy() array, channels last"
    return name

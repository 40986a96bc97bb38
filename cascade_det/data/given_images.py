"""What callers hand to a predictor: files, and pixels that they have read themselves."""

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
    """Check that images can be detected on, all of them before the first one is.

    Args:
        images: a list or tuple, each as :func:`given_pixels` takes it.
        names: where not ``None``, one for each of them.

    Raises:
        ValueError: something else; it says what is wanted.
    """
    if not isinstance(images, list | tuple):
        raise ValueError(f"images are {_WANTED}, or a list of these, not {_kind(images)}")
    for image in images:
        _check_image(image)
    if names is not None and len(names) != len(images):
        raise ValueError(f"there are {len(images)} images, but {len(names)} names")
    return list(images)


def given_pixels(image: Image, image_format: str) -> Pixels:
    """The pixels of an image, uint8 ``[H, W, 3]``.

    Args:
        image: uint8 ``[H, W, 3]`` in BGR order, as OpenCV reads it, or the path of a file.
        image_format: ``"BGR"`` or ``"RGB"``, the order of the channels that is wanted.

    Raises:
        DatasetError: the file is missing or no image.
        ValueError: something else, or an array of another kind.
    """
    _check_image(image)
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
    """The type of a value, and how one of a common kind becomes an image."""
    name = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if name.startswith("PIL."):
        return f"{name}: give np.asarray(image.convert('RGB'))[:, :, ::-1]"
    if name.startswith("torch."):
        return f"{name}: give its numpy() array, channels last"
    return name

"""Reads, resizes and flips images, bit-equal to Detectron2.

Boxes are XYXY in absolute pixels; images are uint8 ``[H, W, 3]``; sizes are (height, width).
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from cascade_det.errors import DatasetError

Pixels = npt.NDArray[np.uint8]
Boxes = npt.NDArray[np.float32]

IMAGE_FORMATS = ("BGR", "RGB")

# The side in pixels up to which Detectron2 considers a box empty.
EMPTY_SIDE = 1e-5
_FLIP_PROBABILITY = 0.5

# The inverse of each EXIF orientation; 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: str, image_format: str) -> Pixels:
    """Read an image, turned upright by its EXIF orientation.

    Grey, palette, CMYK and transparent images are converted to three channels, 16 bits to the upper
    8, and an animation to its first frame.

    Args:
        path: of a file in any format that Pillow reads.
        image_format: ``"BGR"`` or ``"RGB"``, the channel order.

    Returns:
        uint8 ``[H, W, 3]``, contiguous and writable.

    Raises:
        DatasetError: the file is missing, truncated, or not an image that can be decoded.
    """
    try:
        _check_is_file(path)
        return _decoded(path, image_format, None)
    except FileNotFoundError:
        raise DatasetError(f"{path}: there is no such image") from None
    except DatasetError:
        raise
    except Exception as error:  # decoders raise SyntaxError, struct.error, ...
        raise _unreadable(path, error) from error


def decode_image(
    content: bytes, image_format: str, *, name: str, decoders: tuple[str, ...] | None = None
) -> Pixels:
    """Decode the content of an image file as :func:`read_image` does.

    Args:
        content: of the file.
        image_format: ``"BGR"`` or ``"RGB"``, the channel order.
        name: of the image, for errors.
        decoders: names of the formats that Pillow may try; ``None`` for all.

    Returns:
        uint8 ``[H, W, 3]``, contiguous and writable.

    Raises:
        DatasetError: the content is truncated, or not an image that can be decoded.
    """
    file = io.BytesIO(content)
    try:
        return _decoded(file, image_format, decoders)
    except Exception as error:
        raise _unreadable(name, error, repr(file)) from error


def _decoded(file: str | io.BytesIO, image_format: str, decoders: tuple[str, ...] | None) -> Pixels:
    with warnings.catch_warnings():
        # Pillow's warnings about EXIF or size do not matter: it decodes the file or raises.
        warnings.simplefilter("ignore")
        with Image.open(file, formats=decoders) as image:
            image.load()  # turns TIFFs upright and removes their EXIF orientation
            rgb = _to_rgb(_upright(image))
            # Pillow writes either order; reversing with numpy takes longer than decoding.
            pixels = bytearray(rgb.tobytes("raw", image_format))
    return np.frombuffer(pixels, np.uint8).reshape(rgb.height, rgb.width, 3)


def _unreadable(name: str, error: Exception, file: str = "") -> DatasetError:
    reason = str(error).replace(file, repr(name)) if file else error  # Pillow names what it reads
    return DatasetError(f"{name}: cannot be read as an image ({type(error).__name__}: {reason})")


def _check_is_file(path: str) -> None:
    if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would block for ever
        raise DatasetError(f"{path}: is not a file")


def resize_shortest_edge(image: Pixels, short_edge: int, max_size: int) -> Pixels:
    """Resize to :func:`resized_size`; a ``short_edge`` of 0 returns the image unchanged."""
    if short_edge == 0:
        return image
    height, width = image.shape[:2]
    return resize_image(image, resized_size(height, width, short_edge, max_size))


def resized_size(height: int, width: int, short_edge: int, max_size: int) -> tuple[int, int]:
    """(height, width) after resizing the shorter edge to ``short_edge`` pixels.

    The longer edge is at most ``max_size``. Rounds as Detectron2 does, so the order of the
    floating-point operations matters; an edge is at least 1 pixel.
    """
    scale = float(short_edge) / min(height, width)
    new_height, new_width = (
        (float(short_edge), scale * width)
        if height < width
        else (scale * height, float(short_edge))
    )
    longest = max(new_height, new_width)
    if longest > max_size:
        shrink = float(max_size) / longest
        new_height, new_width = new_height * shrink, new_width * shrink
    return max(int(new_height + 0.5), 1), max(int(new_width + 0.5), 1)


def resize_image(image: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize to (height, width) with Pillow's bilinear filter, which is antialiased."""
    height, width = size
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.array(resized)


class Placement(NamedTuple):
    """Where the pixels of an image went: resized from one size to another, and then flipped.

    Attributes:
        old: size before.
        new: size after.
        flipped: 1 if left and right were exchanged, 0 if top and bottom were, ``None`` for neither.
    """

    old: tuple[int, int]
    new: tuple[int, int]
    flipped: int | None

    def boxes(self, boxes: npt.NDArray[np.floating[Any]]) -> tuple[Boxes, npt.NDArray[np.bool_]]:
        """Move boxes ``[G, 4]`` and clip them; also return bool ``[G]``, false for empty ones."""
        height, width = self.new
        # float64 until the end, as in Detectron2, for bit-equal boxes.
        moved = self.points(boxes.astype(np.float64).reshape(-1, 2)).reshape(-1, 4)
        if self.flipped is not None:
            first, last = 1 - self.flipped, 3 - self.flipped  # x or y
            moved[:, [first, last]] = moved[:, [last, first]]
        clipped = np.clip(moved, 0, [width, height] * 2).astype(np.float32)
        wide, high = (clipped[:, 2:] - clipped[:, :2] > EMPTY_SIDE).T
        return clipped, wide & high

    def points(self, points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Move points ``[P, 2]``, x and y."""
        scale = (self.new[1] / self.old[1], self.new[0] / self.old[0])
        moved = points * np.array(scale)
        if self.flipped is not None:
            axis = 1 - self.flipped
            moved[:, axis] = self.new[self.flipped] - moved[:, axis]
        return moved

    def bitmap(self, bitmap: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Move a bitmap of the old size: the nearest pixel for each."""
        return self.labels(np.asarray(bitmap, np.uint8)) > 0

    def labels(self, labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Move labels of pixels, uint8 ``[H, W]`` of the old size: the nearest pixel for each."""
        if self.new != self.old:
            picture = Image.fromarray(labels)
            labels = np.asarray(picture.resize(self.new[::-1], Image.Resampling.NEAREST))
        return labels if self.flipped is None else np.flip(labels, self.flipped)


class TrainTransform:
    """Random resize and flip of an image and its objects; clips boxes and drops empty ones."""

    def __init__(
        self, *, min_sizes: Sequence[int], max_size: int, sampling: str, flip: str
    ) -> None:
        """Set the distributions to draw from.

        Args:
            min_sizes: shorter edges in pixels; 0 for no resizing.
            max_size: largest longer edge in pixels.
            sampling: ``"choice"`` of one of ``min_sizes``, or ``"range"`` between its two values,
                both included.
            flip: ``"horizontal"`` or ``"vertical"``, with probability 1/2, or ``"none"``.
        """
        self.min_sizes = tuple(min_sizes)
        self.max_size = max_size
        self.sampling = sampling
        self.flip = flip

    def __call__(
        self,
        image: Pixels,
        boxes: Boxes,
        classes: npt.NDArray[np.int64],
        generator: np.random.Generator,
    ) -> tuple[Pixels, Boxes, npt.NDArray[np.int64]]:
        """Transform one image, with randomness from ``generator``; the inputs are not changed.

        Returns:
            The image ``[H', W', 3]``, and boxes ``[G', 4]`` and classes ``[G']`` that remain.
        """
        image, placement = self.place(image, generator)
        moved, keep = placement.boxes(boxes)
        return image, moved[keep], classes[keep]

    def place(self, image: Pixels, generator: np.random.Generator) -> tuple[Pixels, Placement]:
        """Transform one image, with randomness from ``generator``; the input is not changed."""
        old_height, old_width = image.shape[:2]
        image = resize_shortest_edge(image, self._draw_short_edge(generator), self.max_size)
        height, width = image.shape[:2]
        flipped = None
        if self.flip != "none" and generator.random() < _FLIP_PROBABILITY:
            flipped = 1 if self.flip == "horizontal" else 0
            image = np.flip(image, flipped)
        return image, Placement((old_height, old_width), (height, width), flipped)

    def _draw_short_edge(self, generator: np.random.Generator) -> int:
        if self.sampling == "range":
            return int(generator.integers(self.min_sizes[0], self.min_sizes[1], endpoint=True))
        return int(generator.choice(self.min_sizes))


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # an image with broken EXIF data is still usable
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion would clip everything above 255.
        high_bytes = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        image = Image.fromarray(high_bytes.astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")

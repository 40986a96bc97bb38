"""Reads the image and the labels of a record."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cascade_det.data.semantic.arrays import open_arrays
from cascade_det.data.semantic.formats import FORMATS, Format
from cascade_det.data.transforms import Pixels, read_image
from cascade_det.errors import DatasetError

# uint8 [H, W, 3], or grey uint8 or float32 [H, W] in 0..255
Picture = npt.NDArray[Any]
Labels = npt.NDArray[np.uint8]

MASK_LEVEL = 128  # grey level from which a mask is foreground
_LABEL_MODES = ("L", "P", "1")


@dataclass(frozen=True)
class SemanticRecord:
    """One image, or one slice of a volume, with its labels.

    Attributes:
        file_name: full path of the image or the array file.
        image_id: position in the data set, from 0.
        height: pixels.
        width: pixels.
        format: one of ``FORMATS``.
        label_file: full path of the label image; "" if the array file holds the labels.
        volume: name of the volume that this is a slice of; "" if it is none.
        slice_index: position in the volume, from 0; ``None`` if it is no slice of one.
    """

    file_name: str
    image_id: int
    height: int
    width: int
    format: str
    label_file: str = ""
    volume: str = ""
    slice_index: int | None = None


def read_pair(record: SemanticRecord, image_format: str) -> tuple[Picture, Labels]:
    """Image and labels of a record, of the record's size.

    Args:
        record: of a checked data set.
        image_format: ``"BGR"`` or ``"RGB"``, the channel order of a coloured image.

    Raises:
        DatasetError: a file cannot be read, or has changed its size.
    """
    how = FORMATS[record.format]
    if how.keys is None:
        image: Picture = read_image(record.file_name, image_format)
        labels = read_label_image(record.label_file, is_mask=how.is_mask)
    else:
        with open_arrays(record.file_name, how.keys) as arrays:
            grey, numbers = arrays.slice(record.slice_index)
        image = grey_levels(grey, record.file_name)
        labels = new_labels(whole_labels(numbers, record.file_name), how)
    for file, array in ((record.file_name, image), (record.label_file, labels)):
        if array.shape[:2] != (record.height, record.width):
            raise DatasetError(
                f"{file or record.file_name}: is {array.shape[1]}x{array.shape[0]} pixels (width x "
                f"height), but was {record.width}x{record.height} when the data set was checked"
            )
    return image, labels


def read_labels(record: SemanticRecord) -> Labels:
    """The true labels of a record, uint8 ``[H, W]`` at the size of the original image.

    Raises:
        DatasetError: a file cannot be read, or has changed its size.
    """
    how = FORMATS[record.format]
    if how.keys is None:
        return read_label_image(record.label_file, is_mask=how.is_mask)
    return read_pair(record, "RGB")[1]


def read_label_image(path: str, *, is_mask: bool = False) -> Labels:
    """A label image as uint8 ``[H, W]``: the values in the file, not the colours of a palette.

    Args:
        path: of an image of one channel of at most 8 bits.
        is_mask: whether it is a mask of any 8-bit mode, for labels 0 and 1.

    Raises:
        DatasetError: the file cannot be read, or has several channels or more bits.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                image.load()
                mode = image.mode
                if is_mask and mode in (*_LABEL_MODES, "RGB", "RGBA", "LA"):
                    return (np.asarray(image.convert("L")) >= MASK_LEVEL).astype(np.uint8)
                labels = np.array(image) if mode in _LABEL_MODES else None
    except FileNotFoundError:
        raise DatasetError(f"{path}: there is no such label image") from None
    except Exception as error:  # decoders raise SyntaxError, struct.error, ...
        raise DatasetError(
            f"{path}: cannot be read as an image ({type(error).__name__}: {error})"
        ) from error
    if labels is None:
        raise DatasetError(
            f"{path}: a label image has one channel of 8 bits with the class of each pixel, but "
            f"this one has the mode {mode!r}"
        )
    return labels.astype(np.uint8)


def grey_levels(grey: npt.NDArray[Any], path: str) -> Picture:
    """Grey levels in 0..255 of an array ``[H, W]``: float32 of numbers in [0, 1], uint8 as it is.

    Raises:
        DatasetError: another type, or a number that is not finite.
    """
    if grey.dtype == np.uint8:
        return grey
    if grey.dtype.kind != "f":
        raise DatasetError(
            f"{path}: the image holds {grey.dtype}; give uint8, or floating-point numbers in [0, 1]"
        )
    levels = 255 * grey.astype(np.float32)
    if not np.isfinite(levels).all():
        raise DatasetError(f"{path}: the image has pixels that are not finite numbers")
    return levels


def whole_labels(numbers: npt.NDArray[Any], path: str) -> Labels:
    """Labels of any numeric type as uint8.

    Raises:
        DatasetError: one is not a whole number from 0 to 255.
    """
    labels = numbers.astype(np.uint8) if numbers.dtype.kind != "f" else _cast(numbers)
    wrong = labels != numbers
    if wrong.any():
        raise DatasetError(
            f"{path}: the labels are whole numbers from 0 to 255, not {numbers[wrong][0]}"
        )
    return labels


def _cast(numbers: npt.NDArray[Any]) -> Labels:
    with np.errstate(invalid="ignore"):  # nan, which equals nothing
        return numbers.astype(np.uint8)


def new_labels(labels: Labels, how: Format) -> Labels:
    """The class of each label; ignored and unknown ones stay."""
    if not how.new_label:
        return labels
    table = np.arange(256, dtype=np.uint8)
    table[: len(how.new_label)] = how.new_label
    return table[labels]


def pixels_of(image: Picture) -> Pixels | npt.NDArray[np.float32]:
    """Channels first, ``[3, H, W]``, contiguous and writable; a grey image has three equal ones."""
    if image.ndim == 2:
        return np.array(np.broadcast_to(image, (3, *image.shape)), order="C")
    return np.array(image.transpose(2, 0, 1), order="C")


def visible_pixels(image: Picture) -> Pixels:
    """An image as uint8 ``[H, W, 3]`` for a picture; a grey image has three equal channels."""
    levels = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return levels if levels.ndim == 3 else np.repeat(levels[..., None], 3, axis=2)

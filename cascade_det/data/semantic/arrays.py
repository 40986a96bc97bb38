"""Reads images and labels from ``.npz`` and ``.npy.h5`` files, which may come from strangers.

Nothing is unpickled, and an HDF5 file cannot lead to another file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.npyio import NpzFile

from cascade_det.data.semantic.formats import H5
from cascade_det.errors import DatasetError

Array = npt.NDArray[Any]


class Arrays:
    """The image and the labels of an open file, both ``[H, W]``, or ``[Z, H, W]`` for a volume.

    Attributes:
        shape: of both.
        num_slices: Z, or ``None`` for a single slice.
    """

    def __init__(self, path: str, image: Any, labels: Any) -> None:
        for name, array in (("image", image), ("label", labels)):
            if array.dtype.kind not in "buif":
                raise DatasetError(f"{path}: the {name} array holds {array.dtype}, not numbers")
            if array.ndim not in (2, 3) or 0 in array.shape:
                raise DatasetError(
                    f"{path}: the {name} array has the shape {list(array.shape)}, not that of a "
                    "slice [H, W] or a volume [Z, H, W]"
                )
        if image.shape != labels.shape:
            raise DatasetError(
                f"{path}: the image has the shape {list(image.shape)}, but the labels have "
                f"{list(labels.shape)}"
            )
        self._image, self._labels = image, labels
        self.shape: tuple[int, ...] = tuple(image.shape)
        self.num_slices = image.shape[0] if image.ndim == 3 else None

    def slice(self, index: int | None) -> tuple[Array, Array]:
        """Image and labels ``[H, W]`` of one slice; ``None`` for the only one."""
        at: Any = () if index is None else index
        return np.asarray(self._image[at]), np.asarray(self._labels[at])


@contextmanager
def open_arrays(path: str, keys: tuple[str, str]) -> Iterator[Arrays]:
    """Open a file with an array for the image and one for the labels.

    Args:
        path: ``.npz``, which is read whole, or ``.npy.h5``, which is read slice by slice.
        keys: of the image and of the labels.

    Raises:
        DatasetError: the file cannot be read, lacks a key, or has arrays of another kind or shape;
            in the block, a slice cannot be read; h5py is needed and not installed.
    """
    try:
        with _opened(path) as file:
            read = _npz_array if isinstance(file, NpzFile) else _h5_array
            yield Arrays(path, *(read(file, path, key) for key in keys))
    except FileNotFoundError:
        raise DatasetError(f"{path}: there is no such file") from None
    except DatasetError:
        raise
    except Exception as error:  # damaged files raise zlib.error, struct.error, KeyError, ...
        raise DatasetError(f"{path}: cannot be read as arrays ({error})") from error


def _opened(path: str) -> Any:
    if path.lower().endswith(H5):
        return _h5py().File(path, "r")
    file = np.load(path, allow_pickle=False)
    if not isinstance(file, NpzFile):
        raise DatasetError(f"{path}: is a single array, not an archive (.npz) of several")
    return file


def _npz_array(archive: Any, path: str, key: str) -> Any:
    if key not in archive.files:
        raise _no_key(path, key, archive.files)
    try:
        return archive[key]
    except ValueError as error:  # objects, which only unpickling could read
        raise DatasetError(f"{path}: the array {key!r} is not read: {error}") from error


def _h5_array(file: Any, path: str, key: str) -> Any:
    h5py = _h5py()
    if key not in file:
        raise _no_key(path, key, list(file))
    # Links, virtual and external data can name any other file of this machine.
    if not isinstance(file.get(key, getlink=True), h5py.HardLink):
        raise DatasetError(f"{path}: {key!r} is a link. Store the array itself.")
    found = file[key]
    if not isinstance(found, h5py.Dataset):
        raise DatasetError(f"{path}: {key!r} is a group, not an array")
    if found.is_virtual or found.external:
        raise DatasetError(f"{path}: the data of {key!r} lie in another file. Store them in it.")
    return found


def _no_key(path: str, key: str, found: list[str]) -> DatasetError:
    return DatasetError(f"{path}: has no array {key!r}; it has {', '.join(found[:5]) or 'none'}")


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise DatasetError(
            "volumes in .npy.h5 files need the package h5py: pip install 'cascade_det[medical]'"
        ) from None
    return h5py

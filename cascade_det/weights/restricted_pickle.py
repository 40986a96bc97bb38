"""Reads pickles of numpy arrays in plain containers without executing anything.

Model-zoo weights are pickles, and reading a pickle may call any function that it names. Here the
few names that numpy's arrays need resolve to stand-ins that only collect shape, type and bytes;
all others are refused, ``builtins`` included.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from cascade_det.errors import CheckpointError
from cascade_det.weights.reading import reading

_NUMBER = re.compile(r"[biufc]\d{1,2}")


def read_array_pickle(path: Path) -> Any:
    """Read a pickle of dicts, lists, plain values and numeric numpy arrays.

    The pickle may be of Python 2, of any protocol and any numpy version.

    Args:
        path: a local file.

    Returns:
        The content; arrays and numpy scalars as native-endian ``np.ndarray``.

    Raises:
        CheckpointError: the file names any other global, is truncated, or is not a pickle.
    """
    with reading(path, "a pickle of arrays"):
        content = path.read_bytes()
        _check_sizes(content)
        return _unwrap(_ArrayUnpickler(io.BytesIO(content), path).load(), {})


def _check_sizes(content: bytes) -> None:
    """Raise ValueError if the pickle claims more than it holds.

    The unpickler allocates by claimed lengths and memo places before it reads the data: five
    damaged bytes make it fill gigabytes.
    """
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name.endswith("PUT") and argument is not None and argument > count:
            raise ValueError(f"place {argument} in a memo of at most {count}")


class _DType:
    """Stand-in for ``np.dtype``: plain numbers only."""

    def __init__(self, code: str, *_: object) -> None:
        if not _NUMBER.fullmatch(code):
            raise ValueError(f"an array of type {code!r} holds no weights")
        self.code = code
        self.byte_order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.byte_order = state[1]

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.byte_order + self.code)


class _Array:
    """Stand-in for ``np.ndarray``, filled by the pickle's state: shape, type, order, bytes."""

    def __init__(self, *_: object) -> None:
        self.value = np.empty(0, np.float32)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, is_fortran, raw = state
        self._fill(raw, dtype, shape, "F" if is_fortran else "C")

    def _fill(self, raw: bytes | str, dtype: _DType, shape: tuple[int, ...], order: str) -> None:
        # Python 2 pickled bytes as text, which encoding="latin1" maps one to one.
        data = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
        layout: Literal["C", "F"] = "F" if order == "F" else "C"
        array = np.frombuffer(data, dtype.numpy()).reshape(shape, order=layout)
        self.value = array.astype(array.dtype.newbyteorder("="), order="C")


class _ArrayUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file, encoding="latin1")
        self._path = path
        # Bound methods, not functions: a pickle cannot set attributes on them.
        self._admitted: dict[tuple[str, str], Callable[..., object]] = {
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _DType,
            ("numpy.core.multiarray", "_reconstruct"): _Array,
            ("numpy.core.multiarray", "scalar"): self._scalar,
            ("numpy.core.numeric", "_frombuffer"): self._array_from_buffer,
            ("_codecs", "encode"): self._encode,
        }

    def find_class(self, module: str, name: str, /) -> Any:
        # numpy 2 renamed numpy.core to numpy._core.
        known = self._admitted.get((module.replace("numpy._core", "numpy.core"), name))
        if known is None:
            raise CheckpointError(
                f"{self._path}: refused, because reading it would call {module[:99]}.{name[:99]}. "
                "A file of weights holds numpy arrays and nothing else. Take it from a source that "
                "you trust, or convert it there to .safetensors."
            )
        return known

    def _array_from_buffer(
        self, raw: bytes | str, dtype: _DType, shape: tuple[int, ...], order: str, *_: object
    ) -> _Array:
        array = _Array()
        array._fill(raw, dtype, shape, order)
        return array

    def _scalar(self, dtype: _DType, raw: bytes | str) -> _Array:
        return self._array_from_buffer(raw, dtype, (), "C")

    def _encode(self, text: str, encoding: str = "latin1") -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise ValueError(f"bytes in encoding {encoding!r}")
        return text.encode("latin1")


def _unwrap(value: Any, done: dict[int, Any]) -> Any:
    """Replace stand-ins by their arrays. Shared objects stay shared, or size could explode."""
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        result: Any = {}
        done[id(value)] = result
        result.update((key, _unwrap(item, done)) for key, item in value.items())
        return result
    if isinstance(value, (list, tuple)):
        result = []
        done[id(value)] = result
        result.extend(_unwrap(item, done) for item in value)
        return result
    return value

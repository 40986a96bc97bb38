"""Files by path or by an address that fsspec knows, such as ``s3://bucket/name``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from cascade_det.errors import CascadeDetError, ConfigError
from cascade_det.text import printable

# As fsspec, which also chains them: zip://a.png::s3://bucket/b.zip
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::|://)")
_LOCAL = ("file://", "local://")


def is_address(text: str) -> bool:
    """Whether it is an address, not a path on this machine."""
    return _ADDRESS.match(text) is not None


def local_or_address(text: str) -> str:
    """An absolute path for a path or a ``file://`` address; other addresses as they are."""
    for scheme in _LOCAL:
        if text.startswith(scheme):
            return os.path.abspath(text.removeprefix(scheme))
    return text if is_address(text) else os.path.abspath(text)


def file_system(address: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path there.

    Raises:
        ConfigError: fsspec, or what it needs for this scheme, is not installed.
        CascadeDetError: the address cannot be used.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise ConfigError(missing_extra(f"{printable(address)} is read by fsspec", error)) from None
    with naming_address(address):
        fs, path = url_to_fs(address)
    return fs, path


def missing_extra(what: str, error: ImportError, extra: str = "parquet") -> str:
    """The message for a package of an extra that cannot be imported."""
    return (
        f"{what}, which cannot be imported ({error}): pip install 'cascade_det[{extra}]', an extra"
    )


@contextmanager
def naming_address(address: str) -> Iterator[None]:
    """Turn any error of the block into a CascadeDetError that names the address."""
    try:
        yield
    except CascadeDetError:
        raise
    except ImportError as error:  # such as s3fs, for s3://
        raise ConfigError(f"{printable(address)}: {error}") from error
    except Exception as error:  # file systems raise errors of their own libraries
        raise CascadeDetError(
            f"{printable(address)}: {type(error).__name__}: {printable(str(error), longest=500)}"
        ) from error


@contextmanager
def opened(address: str) -> Iterator[IO[bytes]]:
    """A file, open for reading bytes.

    Args:
        address: an absolute path, or an address.

    Raises:
        CascadeDetError: it cannot be opened or read; also from the block.
    """
    if is_address(address):
        fs, path = file_system(address)
        with naming_address(address), fs.open(path, "rb") as file:
            yield file
    else:
        with naming_address(address), open(address, "rb") as file:
            yield file

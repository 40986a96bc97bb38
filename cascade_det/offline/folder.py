"""The folder of a run's results, local or at an address."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from cascade_det.files import atomic_path, remove_leftovers
from cascade_det.offline.addresses import (
    file_system,
    is_address,
    local_or_address,
    naming_address,
    opened,
)
from cascade_det.text import printable

# There a file appears when all of it has arrived.
_ATOMIC = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "memory"}


class OutputFolder:
    """Files that are complete or absent, also if several processes write the same one.

    Args:
        address: a path, or an address that fsspec knows; the folder may be missing.

    Raises:
        ConfigError: fsspec lacks a package for the address.
    """

    def __init__(self, address: str) -> None:
        self._address = local_or_address(address).rstrip("/")
        if is_address(self._address):
            file_system(self._address)

    def __str__(self) -> str:
        return printable(self._address)

    def address(self, name: str) -> str:
        """Path or address of a file."""
        return f"{self._address}/{name}"

    def exists(self, name: str) -> bool:
        """Whether there is a file or a folder of that name."""
        address = self.address(name)
        if not is_address(address):
            return Path(address).exists()
        fs, path = file_system(address)
        with naming_address(address):
            fs.invalidate_cache()
            return bool(fs.exists(path))

    def names(self, name: str) -> set[str]:
        """Names in a folder of this one, which may be missing; leftovers of killed writers go.

        Args:
            name: of the folder there; empty for this one itself.
        """
        address = self.address(name).rstrip("/")
        if not is_address(address):
            folder = Path(address)
            remove_leftovers(folder)
            return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        fs, path = file_system(address)
        with naming_address(address):
            fs.invalidate_cache()
            try:
                return {entry.rstrip("/").rpartition("/")[2] for entry in fs.ls(path, detail=False)}
            except FileNotFoundError:
                return set()

    def read(self, name: str) -> bytes:
        """The content of a file."""
        with opened(self.address(name)) as file:
            return file.read()

    def write(self, name: str, content: bytes) -> None:
        """Write a file at once; one of that name is replaced."""
        self.write_with(name, lambda file: file.write(content))

    def write_with(self, name: str, write: Callable[[IO[bytes]], object]) -> None:
        """Write a file by a function that is called once; after an error nothing has changed."""
        address = self.address(name)
        if not is_address(address):
            with atomic_path(address) as temporary, temporary.open("wb") as file:
                write(file)
            return
        # First here: a stream to a store that is closed after an error may complete the object.
        with tempfile.NamedTemporaryFile() as file:
            write(file)
            file.flush()
            _upload(file.name, address)


def _upload(file: str, address: str) -> None:
    fs, path = file_system(address)
    folder, _, name = path.rpartition("/")
    at_once = address.partition("://")[0] in _ATOMIC
    target = path if at_once else f"{folder}/.{secrets.token_hex(8)}-{name}"
    with naming_address(address):
        with suppress(NotImplementedError):
            fs.makedirs(folder, exist_ok=True)
        fs.put_file(file, target)
        if target != path:
            fs.mv(target, path)

"""Sources from what a user names: files, folders, globs, addresses, videos, cameras."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from cascade_det.data.given_files import find_images, matching, nothing_found
from cascade_det.data.watched_folder import WatchedFolders
from cascade_det.data.web_images import WebImage, check_address, is_web_address
from cascade_det.errors import DatasetError
from cascade_det.streams.camera import CameraSource
from cascade_det.streams.frames import Source
from cascade_det.streams.images import ImageSource, WatchedSource
from cascade_det.streams.video import VIDEO_SUFFIXES, VideoSource, is_stream_address

LIST_NAME = "-"
_Item = Path | WebImage | VideoSource | CameraSource


def find_sources(names: Sequence[str], listed: Iterable[str] = ()) -> list[Source]:
    """Sources in the order of their names; an image or video that is named twice counts once.

    Args:
        names: files of images or videos, folders with images, globs, ``http(s)://`` addresses of
            images, ``rtsp://`` and others of videos (see ``is_stream_address``), numbers of
            cameras, and ``-`` for the names in ``listed``. What exists is a file, whatever its
            name.
        listed: one name per line; empty lines are skipped.

    Raises:
        DatasetError: nothing is found for a name, or a video or camera cannot be opened.
        ConfigError: a video is named, and PyAV is not installed.
    """
    items: dict[str, _Item] = {}
    for name in _expanded(names, listed):
        for key, item in _items(name, items):
            items[key] = item
    if not items:
        raise DatasetError("--input -: the list has no names")
    sources: list[Source] = []
    for is_image, group in groupby(items.values(), lambda i: isinstance(i, Path | WebImage)):
        found: list[Any] = [*group]
        sources += [ImageSource(found)] if is_image else found
    return sources


def watch(names: Sequence[str]) -> WatchedSource:
    """The folders of these names, in which images appear.

    Raises:
        DatasetError: a name is not of a folder.
    """
    folders = [Path(name) for name in names]
    for folder in folders:
        if not folder.is_dir():
            raise DatasetError(f"--input {folder}: is not a folder, and only folders are watched")
    return WatchedSource(WatchedFolders(folders))


def _expanded(names: Iterable[str], listed: Iterable[str]) -> Iterator[str]:
    for name in names:
        if name == LIST_NAME:
            yield from (line for line in (text.rstrip("\r\n") for text in listed) if line.strip())
        else:
            yield name


def _items(name: str, known: dict[str, _Item]) -> Iterator[tuple[str, _Item]]:
    """What a name stands for, by what identifies it; opens nothing that is known."""
    if not Path(name).exists():
        item = known[name] if name in known else _elsewhere(name)
        if item is not None:
            yield name, item
            return
    paths = [found for path in matching(name) for found in _files(path)]
    if not paths:
        raise nothing_found(name)
    for path in paths:
        is_video = path.suffix.lower() in VIDEO_SUFFIXES
        key = str(path)
        yield key, known.get(key) or (VideoSource(path) if is_video else path)


def _files(path: Path) -> list[Path]:
    """The file, or the images of a folder."""
    try:
        return find_images([str(path)])
    except DatasetError:
        return []


def _elsewhere(name: str) -> _Item | None:
    check_address(name)
    if is_stream_address(name):
        return VideoSource(name)
    if is_web_address(name):
        return WebImage(name)
    return CameraSource(int(name)) if name.isascii() and name.isdecimal() else None

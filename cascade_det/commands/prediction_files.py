"""The output folder of ``predict``: the files of each image, and one json for all."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

from pycocotools import mask as coco_mask

from cascade_det.commands.earlier_predictions import (
    LINES_FILE,
    RESULT_FILE,
    SUFFIXES,
    check_replaced,
    is_of_image,
    made_before,
    other_files,
    read_lines,
)
from cascade_det.errors import CascadeDetError, DatasetError
from cascade_det.files import atomic_path, naming, remove_leftovers

_SUFFIX = SUFFIXES["picture"]
_LONGEST_FILE_NAME = 255  # bytes
# How a failure names a file of an image.
_NAMES = {"picture": "picture", "labels": "label image"}


class PredictionFolder:
    """The files and results of one run, a context manager: the json is complete on exit.

    Replaces only files that an earlier run made, according to that run's result file, which is
    removed at the start. Each image becomes a line of ``predictions.jsonl`` when it is done;
    ``predictions.json`` is made from them at the end. Memory holds file names only.

    Args:
        folder: made if missing.
        files: the images, whose pictures will be ``name.jpg``; image ids count them from 1.
        categories: ``{"id", "name"}`` of each class.
        others: names of other files that the run writes to the folder.
        labels: each image has a label image, ``name.png``, and no detections.

    Attributes:
        path: the folder.
        files: see above.
        seen: files processed so far.
        done: images with results.
        detections: in all images.
        failed: files that could not be read, and images of which a file could not be written.

    Raises:
        DatasetError: a file would replace one of the images, or a file that no earlier run made,
            or another run is writing to the folder; nothing has changed.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[Path],
        categories: Sequence[dict[str, Any]],
        others: Sequence[str] = (),
        *,
        labels: bool = False,
    ) -> None:
        self.path, self.files = folder, files
        self._categories, self._labels = categories, labels
        pictures = picture_names(files)
        # By the keys of the json.
        self._names: dict[str, list[str]] = {"picture": pictures}
        if labels:
            self._names["labels"] = [n.removesuffix(_SUFFIX) + SUFFIXES["labels"] for n in pictures]
        self.seen = self.done = self.detections = self.failed = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = _open_alone(folder / LINES_FILE)
        try:
            made = made_before(folder)
            names = [name for names in self._names.values() for name in names]
            written = [*names, RESULT_FILE, LINES_FILE, *others]
            check_replaced(folder, written, files, made)
        except BaseException:
            if not os.fstat(self._lines.fileno()).st_size:
                (folder / LINES_FILE).unlink()
            self._lines.close()
            raise
        remove_leftovers(folder)
        older = [name for name in made if (folder / name).is_file()]
        self._others = other_files([*others, *older])
        older = [name for name in older if is_of_image(name)]
        # Listed before they are made, so that later runs may replace them even if this is killed.
        self._pictures = list(dict.fromkeys([*names, *older]))
        self._lines.truncate(0)
        self._append({"pictures": self._pictures, "others": self._others})
        (folder / RESULT_FILE).unlink(missing_ok=True)

    @property
    def summary(self) -> str:
        """What is done so far, in words."""
        found = "" if self._labels else f", {self.detections} detections"
        return f"{self.done} images{found}"

    def __enter__(self) -> PredictionFolder:
        return self

    def add(
        self,
        number: int,
        size: tuple[int, int],
        results: Sequence[dict[str, Any]],
        files: Mapping[str, Callable[[], bytes]],
    ) -> str | None:
        """Write the files and results of an image.

        Args:
            number: of the file, from 0.
            size: height and width in pixels.
            results: detections in COCO's result format.
            files: functions that return the content of the ``picture`` and, with label images, of
                the ``labels``.

        Returns:
            The reason if a file could not be written; the results and the other file are kept.

        Raises:
            OSError: the results cannot be written.
        """
        height, width = size
        image: dict[str, Any] = {"id": number + 1, "file_name": str(self.files[number])}
        image |= {"height": height, "width": width}
        reasons = []
        for key, encode in files.items():
            name = self._names[key][number]
            try:
                with atomic_path(self.path / name) as temporary:
                    temporary.write_bytes(encode())
                image[key] = name
            except ValueError as error:
                reasons.append(f"no {_NAMES[key]}: {error}")
            except OSError as error:
                reasons.append(f"no {_NAMES[key]}: {name}: {error.strerror or error}")
        line: dict[str, Any] = {"image": image, "annotations": results}
        reason = "; ".join(reasons) or None
        if reason is not None:
            line["failed"] = self._failure(number, reason)
        self._append(line)
        self.seen += 1
        self.done += 1
        self.detections += len(results)
        self.failed += reason is not None
        return reason

    def fail(self, number: int, reason: str) -> None:
        """Record why file ``number``, from 0, has no results.

        Raises:
            OSError: the record cannot be written.
        """
        self._append({"failed": self._failure(number, reason)})
        self.seen += 1
        self.failed += 1

    def __exit__(self, *_: object) -> None:
        """Make ``predictions.json`` from the images done so far, however the run ended."""
        path = self.path / RESULT_FILE
        try:
            with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
                self._compose(file)
            (self.path / LINES_FILE).unlink()
        except OSError as reason:
            raise CascadeDetError(
                f"{path}: {reason.strerror or reason}. The results are in {LINES_FILE} there."
            ) from reason
        finally:
            self._lines.close()

    def _failure(self, number: int, reason: str) -> dict[str, str]:
        return {"file_name": str(self.files[number]), "reason": reason}

    def _append(self, line: dict[str, Any]) -> None:
        rest = memoryview((json.dumps(line, allow_nan=False) + "\n").encode())
        with naming(self.path / LINES_FILE):
            # A write to a disk that fills up may be partial.
            while rest:
                rest = rest[self._lines.write(rest) :]

    def _compose(self, file: TextIO) -> None:
        file.write('{"images": [')
        _write_items(file, (line["image"] for line in self._read("image")))
        if not self._labels:
            file.write('\n],\n"annotations": [')
            _write_items(file, self._annotations())
        file.write('\n],\n"failed": [')
        _write_items(file, (line["failed"] for line in self._read("failed")))
        written = {line["image"].get(key) for line in self._read("image") for key in SUFFIXES}
        rest = {
            "categories": list(self._categories),
            "older_pictures": self._existing(sorted(set(self._pictures) - written)),
            "others": self._existing(self._others),
        }
        file.write(f"\n],\n{json.dumps(rest)[1:]}\n")

    def _annotations(self) -> Iterator[dict[str, Any]]:
        found = (entry for line in self._read("image") for entry in line["annotations"])
        for number, entry in enumerate(found, start=1):
            yield entry | {"id": number, "area": _area(entry), "iscrowd": 0}

    def _existing(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if (self.path / name).is_file()]

    def _read(self, key: str) -> Iterator[dict[str, Any]]:
        return (line for line in read_lines(self.path / LINES_FILE) if key in line)


def _area(entry: dict[str, Any]) -> float:
    """Of the mask or, without one, of the box."""
    if "segmentation" in entry:
        return float(coco_mask.area(entry["segmentation"]))
    _, _, width, height = entry["bbox"]
    area: float = width * height
    return area


def _write_items(file: TextIO, items: Iterable[dict[str, Any]]) -> None:
    for count, item in enumerate(items):
        file.write(f"{',' * (count > 0)}\n{json.dumps(item)}")


def picture_names(files: Iterable[Path]) -> list[str]:
    """``name.jpg`` for each file, numbered where names are equal, or equal to some file systems.

    Names that are too long are cut.
    """
    names: dict[str, str] = {}
    counts: dict[str, int] = {}
    for file in files:
        stem = file.stem
        name, number = _named(stem, ""), counts.get(_folded(stem), 1)
        while _folded(name) in names:
            number += 1
            name = _named(stem, f"_{number}")
        counts[_folded(stem)] = number
        names[_folded(name)] = name
    return list(names.values())


def _named(stem: str, number: str) -> str:
    while len(os.fsencode(name := f"{stem}{number}{_SUFFIX}")) > _LONGEST_FILE_NAME:
        stem = stem[:-1]
    return name


def _folded(name: str) -> str:
    """Equal for names that a file system may not tell apart: by case or composed letters."""
    return unicodedata.normalize("NFC", name).casefold()


def _open_alone(path: Path) -> FileIO:
    """Open the lines of a run for appending, by this process alone."""
    while True:
        # Not a link or a pipe: writes would go somewhere else, or nowhere.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        with naming(path):
            file = FileIO(os.open(path, flags, 0o666), "r+")
        try:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DatasetError(
                    f"{path}: is not a file. Move it away, or give another --output."
                )
            _lock(file, path)
            # Another run may have ended, and removed its file, before the lock.
            if path.exists() and os.path.samestat(status, path.lstat()):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: FileIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DatasetError(
            f"{path.parent}: another run is writing to this folder. Wait for it to finish, or give "
            "another --output."
        ) from None
    except OSError:
        pass  # Some network file systems have no locks.

"""The output folder of ``predict``: the files of images and videos, and one json for all."""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Any, TextIO

from cascade_det.commands.earlier_predictions import (
    LINES_FILE,
    SUFFIXES,
    check_replaced,
    is_of_image,
    made_before,
    other_files,
    read_lines,
)
from cascade_det.commands.file_stems import UniqueStems
from cascade_det.data.coco_results import PREDICTIONS_FILE, area_of, json_items
from cascade_det.errors import CascadeDetError, DatasetError
from cascade_det.files import atomic_path, naming, remove_leftovers
from cascade_det.streams.frames import BadFrame, Frame, Moving, Origin

# How a failure names a file of an image.
_NAMES = {"picture": "picture", "labels": "label image"}


class PredictionFolder:
    """The files and results of one run, a context manager: the json is complete on exit.

    Replaces only files that an earlier run made, according to that run's result file, which is
    removed at the start. Each image becomes a line of ``predictions.jsonl`` when it is done;
    ``predictions.json`` is made from them at the end. Memory holds file names only.

    Args:
        folder: made if missing.
        origins: the images, whose pictures will be ``name.jpg``, and videos, which will be
            ``name.mp4``. Further images may follow in ``add``.
        categories: ``{"id", "name"}`` of each class.
        others: names of other files and folders that the run writes to the folder.
        labels: each image has a label image, ``name.png``, and no detections.

    Attributes:
        path: the folder.
        seen: images and frames processed so far; image ids count them from 1.
        done: those with results.
        detections: in all of them.
        failed: those that could not be read, or of which a file could not be written, and videos
            that could not be written.

    Raises:
        DatasetError: a file would replace one of the images, or a file that no earlier run made,
            or another run is writing to the folder; nothing has changed.
    """

    def __init__(
        self,
        folder: Path,
        origins: Sequence[Origin],
        categories: Sequence[dict[str, Any]],
        others: Sequence[str] = (),
        *,
        labels: bool = False,
    ) -> None:
        self.path = folder
        self._categories, self._labels = categories, labels
        self._unique = UniqueStems()
        self._stems = {origin: self._unique.add(origin.stem) for origin in origins}
        self.seen = self.done = self.detections = self.failed = 0
        self._moving = any(isinstance(origin, Moving) for origin in origins)
        folder.mkdir(parents=True, exist_ok=True)
        self._lines, self._writing = _open_alone(folder / LINES_FILE), Lock()
        names = [n for o, stem in self._stems.items() for n in self._names_of(o, stem).values()]
        try:
            made = made_before(folder)
            written = [*names, PREDICTIONS_FILE, LINES_FILE, *others]
            check_replaced(folder, written, filter(None, map(_file_of, origins)), made)
        except BaseException:
            if not os.fstat(self._lines.fileno()).st_size:
                (folder / LINES_FILE).unlink()
            self._lines.close()
            raise
        remove_leftovers(folder)
        older = [name for name in made if os.path.lexists(folder / name)]
        self._others = other_files([*others, *older])
        older = [name for name in older if is_of_image(name)]
        self._older = set(older)
        # Listed before they are made, so that later runs may replace them even if this is killed.
        self._pictures = list(dict.fromkeys([*names, *older]))
        self._lines.truncate(0)
        self._append({"pictures": self._pictures, "others": self._others})
        (folder / PREDICTIONS_FILE).unlink(missing_ok=True)

    @property
    def summary(self) -> str:
        """What is done so far, in words."""
        found = "" if self._labels else f", {self.detections} detections"
        return f"{self.done} {'frames' if self._moving else 'images'}{found}"

    def __enter__(self) -> PredictionFolder:
        return self

    def stem_of(self, origin: Origin) -> str:
        """The stem of the names of the files of an image or a video.

        Of an image that was not known at the start, call it once: it finds a name that replaces
        nothing which no earlier run made.
        """
        if origin in self._stems:
            return self._stems[origin]
        while True:
            stem = self._unique.add(origin.stem)
            names = self._names_of(origin, stem).values()
            if all(n in self._older or not os.path.lexists(self.path / n) for n in names):
                self._append({"pictures": list(names)})
                return stem

    def add(
        self,
        frame: Frame,
        stem: str,
        results: Sequence[dict[str, Any]],
        files: Mapping[str, Callable[[], bytes]],
        more: Mapping[str, Callable[[], bytes]] | None = None,
    ) -> str | None:
        """Write the files and results of an image, or the results of a frame.

        Args:
            frame: the image.
            stem: from ``stem_of``.
            results: detections in COCO's result format, for the image id ``seen + 1``.
            files: functions that return the content of the ``picture`` and, with label images, of
                the ``labels``.
            more: the same for further files, by names below the folder.

        Returns:
            The reason if a file could not be written; the results and other files are kept.

        Raises:
            OSError: the results cannot be written.
        """
        height, width = frame.pixels.shape[:2]
        image: dict[str, Any] = {"id": self.seen + 1, "file_name": str(frame.origin)}
        image |= {"height": height, "width": width}
        if frame.number is not None:
            image |= {"frame": frame.number, "seconds": frame.seconds}
        reasons = []
        for key, encode in files.items():
            name = stem + SUFFIXES[key]
            reason = self._write(name, encode, _NAMES[key])
            if reason is None:
                image[key] = name
            else:
                reasons.append(reason)
        for name, encode in (more or {}).items():
            # Waiting for the disk would take longer than all else for the many files of a video.
            reason = self._write(name, encode, name, durable=False)
            reasons += [reason] if reason else []
        line: dict[str, Any] = {"image": image, "annotations": results}
        told = "; ".join(reasons) or None
        if told is not None:
            line["failed"] = _failure(frame.origin, frame.number, told)
        self._append(line)
        self.seen += 1
        self.done += 1
        self.detections += len(results)
        self.failed += told is not None
        return told

    def add_video(self, origin: Origin, name: str, frames: int) -> None:
        """Record a video that was written: its name and number of frames.

        Raises:
            OSError: the record cannot be written.
        """
        self._append({"videos": {"file_name": str(origin), "video": name, "frames": frames}})

    def fail(self, bad: BadFrame, *, counted: bool = True) -> None:
        """Record why an image or a frame has no results, or a video was not written.

        Args:
            bad: what failed.
            counted: it is an image or a frame, which takes an id.

        Raises:
            OSError: the record cannot be written.
        """
        self._append({"failed": _failure(bad.origin, bad.number, bad.reason)})
        self.seen += counted
        self.failed += 1

    def __exit__(self, *_: object) -> None:
        """Make ``predictions.json`` from the images done so far, however the run ended."""
        path = self.path / PREDICTIONS_FILE
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

    def lines(self) -> Iterator[dict[str, Any]]:
        """What is recorded so far: ``image`` with ``annotations``, or ``failed``, or others."""
        return read_lines(self.path / LINES_FILE)

    def _names_of(self, origin: Origin, stem: str) -> dict[str, str]:
        """By the keys of the json."""
        if isinstance(origin, Moving):
            return {"video": stem + SUFFIXES["video"]}
        keys = ["picture", "labels"] if self._labels else ["picture"]
        return {key: stem + SUFFIXES[key] for key in keys}

    def _write(
        self, name: str, encode: Callable[[], bytes], kind: str, *, durable: bool = True
    ) -> str | None:
        """Returns why the file could not be written."""
        try:
            with atomic_path(self.path / name, durable=durable) as temporary:
                temporary.write_bytes(encode())
        except ValueError as error:
            return f"no {kind}: {error}"
        except OSError as error:
            return f"no {kind}: {name}: {error.strerror or error}"
        return None

    def _append(self, line: dict[str, Any]) -> None:
        rest = memoryview((json.dumps(line, allow_nan=False) + "\n").encode())
        # Two threads write: one the names of new files, the other the results.
        with self._writing, naming(self.path / LINES_FILE):
            # A write to a disk that fills up may be partial.
            while rest:
                rest = rest[self._lines.write(rest) :]

    def _compose(self, file: TextIO) -> None:
        file.write('{"images": [')
        file.writelines(json_items(line["image"] for line in self._read("image")))
        if not self._labels:
            file.write('\n],\n"annotations": [')
            file.writelines(json_items(self._annotations()))
        if self._moving:
            file.write('\n],\n"videos": [')
            file.writelines(json_items(line["videos"] for line in self._read("videos")))
        file.write('\n],\n"failed": [')
        file.writelines(json_items(line["failed"] for line in self._read("failed")))
        lines = (line.get(key) for key in ("image", "videos") for line in self._read(key))
        written = {line[key] for line in lines if line for key in SUFFIXES if key in line}
        rest = {
            "categories": list(self._categories),
            "older_pictures": self._existing(sorted(set(self._pictures) - written)),
            "others": self._existing(self._others),
        }
        file.write(f"\n],\n{json.dumps(rest)[1:]}\n")

    def _annotations(self) -> Iterator[dict[str, Any]]:
        found = (entry for line in self._read("image") for entry in line["annotations"])
        for number, entry in enumerate(found, start=1):
            yield entry | {"id": number, "area": area_of(entry), "iscrowd": 0}

    def _existing(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if (self.path / name).exists()]

    def _read(self, key: str) -> Iterator[dict[str, Any]]:
        return (line for line in self.lines() if key in line)


def _failure(origin: Origin, number: int | None, reason: str) -> dict[str, Any]:
    frame = {} if number is None else {"frame": number}
    return {"file_name": str(origin), **frame, "reason": reason}


def _file_of(origin: Origin) -> Path | None:
    return origin if isinstance(origin, Path) else getattr(origin, "file", None)


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

"""The output folder of ``predict``: a picture of each image, and one json for all."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

from pycocotools import mask as coco_mask

from cascade_det.commands.arguments import file_identity
from cascade_det.data.annotation_file import read_json
from cascade_det.errors import CascadeDetError, DatasetError
from cascade_det.files import atomic_path, naming, remove_leftovers
from cascade_det.text import listed

RESULT_FILE = "predictions.json"
# One object per line: first {"pictures": [...]}, then one per image. It exists during a run, and
# remains if the run is killed.
LINES_FILE = "predictions.jsonl"

_SUFFIX = ".jpg"
_LONGEST_FILE_NAME = 255  # bytes
_MOST_SHOWN = 5


class PredictionFolder:
    """Pictures and results of one run, a context manager: the json is complete on exit.

    Replaces only files that an earlier run made, according to that run's result file, which is
    removed at the start. Each image becomes a line of ``predictions.jsonl`` when it is done;
    ``predictions.json`` is made from them at the end. Memory holds file names only.

    Args:
        folder: made if missing.
        files: the images, whose pictures will be ``name.jpg``; image ids count them from 1.
        categories: ``{"id", "name"}`` of each class.
        others: names of other files that the run writes to the folder.

    Attributes:
        files: see above.
        seen: files processed so far.
        done: images with results.
        detections: in all images.
        failed: files that could not be read, and images whose picture could not be written.

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
    ) -> None:
        self._folder, self.files = folder, files
        self._categories = categories
        self._names = picture_names(files)
        self.seen = self.done = self.detections = self.failed = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = _open_alone(folder / LINES_FILE)
        try:
            made = _made_before(folder)
            written = [*self._names, RESULT_FILE, LINES_FILE, *others]
            _check_replaced(folder, written, files, made)
        except BaseException:
            if not os.fstat(self._lines.fileno()).st_size:
                (folder / LINES_FILE).unlink()
            self._lines.close()
            raise
        remove_leftovers(folder)
        older = [name for name in made if (folder / name).is_file()]
        self._others = _other_files([*others, *older])
        older = [name for name in older if name.endswith(_SUFFIX)]
        # Listed before they are made, so that later runs may replace them even if this is killed.
        self._pictures = list(dict.fromkeys([*self._names, *older]))
        self._lines.truncate(0)
        self._append({"pictures": self._pictures, "others": self._others})
        (folder / RESULT_FILE).unlink(missing_ok=True)

    def __enter__(self) -> PredictionFolder:
        return self

    def add(
        self,
        number: int,
        size: tuple[int, int],
        results: Sequence[dict[str, Any]],
        encode: Callable[[], bytes],
    ) -> str | None:
        """Write the picture and results of an image.

        Args:
            number: of the file, from 0.
            size: height and width in pixels.
            results: detections in COCO's result format.
            encode: returns the content of the picture file.

        Returns:
            The reason if the picture could not be written; the results are kept.

        Raises:
            OSError: the results cannot be written.
        """
        name, reason = self._names[number], None
        try:
            with atomic_path(self._folder / name) as temporary:
                temporary.write_bytes(encode())
        except ValueError as error:
            reason = f"no picture: {error}"
        except OSError as error:
            reason = f"no picture: {name}: {error.strerror or error}"
        height, width = size
        image = {"id": number + 1, "file_name": str(self.files[number])}
        image |= {"height": height, "width": width}
        line: dict[str, Any] = {"image": image, "annotations": results}
        if reason is None:
            image["picture"] = name
        else:
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
        path = self._folder / RESULT_FILE
        try:
            with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
                self._compose(file)
            (self._folder / LINES_FILE).unlink()
        except OSError as reason:
            raise CascadeDetError(
                f"{path}: {reason.strerror or reason}. The detections are in {LINES_FILE} there."
            ) from reason
        finally:
            self._lines.close()

    def _failure(self, number: int, reason: str) -> dict[str, str]:
        return {"file_name": str(self.files[number]), "reason": reason}

    def _append(self, line: dict[str, Any]) -> None:
        rest = memoryview((json.dumps(line, allow_nan=False) + "\n").encode())
        with naming(self._folder / LINES_FILE):
            # A write to a disk that fills up may be partial.
            while rest:
                rest = rest[self._lines.write(rest) :]

    def _compose(self, file: TextIO) -> None:
        file.write('{"images": [')
        _write_items(file, (line["image"] for line in self._read("image")))
        file.write('\n],\n"annotations": [')
        _write_items(file, self._annotations())
        file.write('\n],\n"failed": [')
        _write_items(file, (line["failed"] for line in self._read("failed")))
        written = {line["image"].get("picture") for line in self._read("image")}
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
        return [name for name in names if (self._folder / name).is_file()]

    def _read(self, key: str) -> Iterator[dict[str, Any]]:
        return (line for line in _read_lines(self._folder / LINES_FILE) if key in line)


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


def _made_before(folder: Path) -> list[str]:
    """Names of the files that earlier runs made in a folder, according to their results."""
    made: list[Any] = []
    if os.path.lexists(folder / RESULT_FILE):
        made += _named_by(folder / RESULT_FILE)
    if not (folder / LINES_FILE).stat().st_size:
        made.append(LINES_FILE)
    header = next(_read_lines(folder / LINES_FILE), {})
    if isinstance(header.get("pictures"), list):
        made += [LINES_FILE, *header["pictures"], *_list(header.get("others"))]
    return [name for name in made if isinstance(name, str) and name == os.path.basename(name)]


def _named_by(path: Path) -> list[Any]:
    try:
        content = read_json(path)
    except DatasetError:
        return []
    if not isinstance(content, dict) or not {"images", "failed"} <= content.keys():
        return []
    entries = [entry for entry in _list(content["images"]) if isinstance(entry, dict)]
    pictures = [entry.get("picture") for entry in entries]
    older, others = (_list(content.get(key)) for key in ("older_pictures", "others"))
    return [path.name, *pictures, *older, *others]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _other_files(names: Iterable[str]) -> list[str]:
    """Names of files that are neither pictures nor results, each once."""
    known = (RESULT_FILE, LINES_FILE)
    return [n for n in dict.fromkeys(names) if n not in known and not n.endswith(_SUFFIX)]


def _check_replaced(
    folder: Path, names: Sequence[str], inputs: Sequence[Path], made: Sequence[str]
) -> None:
    """Raise DatasetError if one of these files is an input, or was made by others."""
    inputs_by_identity = {file_identity(file): file for file in inputs}
    ours, foreign = set(made), []
    for name in names:
        path = folder / name
        if not os.path.lexists(path):
            continue
        if (replaced := inputs_by_identity.get(file_identity(path))) and path.exists():
            raise DatasetError(
                f"--output {folder}: {name} would replace the input {replaced}. Give another "
                "folder."
            )
        if name not in ours:
            foreign.append(name)
    if foreign:
        raise DatasetError(
            f"--output {folder}: {listed(foreign, _MOST_SHOWN)} would be replaced, and was not "
            "made by an earlier run. Give another folder, or move it away."
        )


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of lines; skips lines that are not objects, such as truncated ones."""
    with path.open("rb") as file:
        for line in file:
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(content, dict):
                yield content

"""What of the detections is kept, and files of them beside the pictures: crops, YOLO texts, csv."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from cascade_det.commands.file_stems import UniqueStems
from cascade_det.commands.prediction_files import PredictionFolder
from cascade_det.data.transforms import Pixels
from cascade_det.errors import ConfigError, DatasetError
from cascade_det.files import write_csv
from cascade_det.onnx_predictor import ArrayDetections
from cascade_det.report.drawing import encode
from cascade_det.streams.frames import Frame
from cascade_det.text import listed, printable

CROPS, TEXTS, CSV_FILE = "crops", "labels", "predictions.csv"
_SHOWN_CLASSES = 20
_COLUMNS = (
    *("file_name", "frame", "seconds", "class", "category_id", "score"),
    *("x_min", "y_min", "x_max", "y_max", "exit_stage", "track_id"),
)


@dataclass(frozen=True)
class Choice:
    """Which detections of a frame are kept.

    Attributes:
        classes: class indices; ``None`` for all.
        most: the most of a frame, the best ones; ``None`` for all.
        score_threshold: detections below it are in the json, but in nothing else.
    """

    classes: frozenset[int] | None = None
    most: int | None = None
    score_threshold: float = 0.5

    def kept(self, detections: Any) -> ArrayDetections:
        """Those kept of ``Detections`` or ``ArrayDetections``, as arrays; best first as before."""
        columns: dict[str, Any] = {}
        for column in fields(ArrayDetections):
            values = getattr(detections, column.name)
            columns[column.name] = None if values is None else np.asarray(values)
        found = ArrayDetections(**columns)
        if self.classes is not None:
            found = select(found, np.isin(found.classes, sorted(self.classes)))
        return found if self.most is None else select(found, slice(self.most))

    def shown(self, detections: ArrayDetections) -> Any:
        """Bool ``[D]``: which of the kept ones have the score."""
        return detections.scores >= self.score_threshold


def select(detections: ArrayDetections, rows: Any) -> ArrayDetections:
    """Some of the detections, by a mask, an index or a slice."""
    columns: dict[str, Any] = {
        name: None if x is None else x[rows] for name, x in vars(detections).items()
    }
    return replace(detections, **columns)


def class_indices(wanted: Sequence[str], class_names: Sequence[str]) -> frozenset[int]:
    """Indices of classes from their names, or from numbers that are no names.

    Raises:
        ConfigError: there is no such class; the message lists the classes.
    """
    indices = {name: index for index, name in enumerate(class_names)}
    found = set()
    for text in wanted:
        index = indices.get(text, int(text) if text.isascii() and text.isdecimal() else -1)
        if not 0 <= index < len(class_names):
            known = [f"{number} {printable(name)}" for number, name in enumerate(class_names)]
            raise ConfigError(
                f"--classes {printable(text)}: there is no such class. The classes are "
                f"{listed(known, _SHOWN_CLASSES)}"
            )
        found.add(index)
    return frozenset(found)


@dataclass(frozen=True)
class MoreFiles:
    """Which files are written beside the pictures.

    Attributes:
        crops: the pixels of each box, as ``crops/CLASS/NAME_0.jpg``.
        texts: a text for each image or frame in YOLO's format, ``labels/NAME.txt``.
        csv: a table of all detections, ``predictions.csv``.
    """

    crops: bool = False
    texts: bool = False
    csv: bool = False

    @property
    def names(self) -> list[str]:
        """Of what is written to the folder."""
        named = ((self.crops, CROPS), (self.texts, TEXTS), (self.csv, CSV_FILE))
        return [name for wanted, name in named if wanted]

    def check_links(self, folder: Path) -> None:
        """Check that crops and texts will be in the folder, and not where a link leads.

        Raises:
            DatasetError: the folder of crops or texts is a link, or has one to a folder.
        """
        for wanted, name in ((self.crops, CROPS), (self.texts, TEXTS)):
            top = folder / name
            inner = (Path(at, each) for at, folders, _ in os.walk(top) for each in folders)
            for path in (top, *inner) if wanted else ():
                if path.is_symlink():
                    raise DatasetError(
                        f"{path}: is a link. Move it away, or give another --output."
                    )

    def remove_older(self, folder: Path) -> None:
        """Remove the crops and texts of an earlier run, which would be mixed with new ones."""
        for wanted, pattern in (
            (self.crops, f"{CROPS}/*/**/*.jpg"),
            (self.texts, f"{TEXTS}/**/*.txt"),
        ):
            for file in folder.glob(pattern) if wanted else ():
                file.unlink()

    def of(
        self, frame: Frame, stem: str, shown: ArrayDetections, folders: Sequence[str]
    ) -> Mapping[str, Callable[[], bytes]]:
        """Functions that return the contents of an image's files, by name.

        Args:
            frame: the image, or a frame of a video: its files are in a folder named by the stem.
            stem: of the names of its files.
            shown: its detections.
            folders: of the crops of each class, from ``class_folders``.
        """
        name = stem if frame.number is None else f"{stem}/{frame.number:06d}"
        files: dict[str, Callable[[], bytes]] = {}
        if self.texts:
            files[f"{TEXTS}/{name}.txt"] = lambda: yolo_text(
                shown, *frame.pixels.shape[:2]
            ).encode()
        if self.crops:
            for number, (crop, index) in enumerate(_crops(frame.pixels, shown)):
                path = f"{CROPS}/{folders[index]}/{name}_{number}.jpg"
                files[path] = lambda crop=crop: encode(crop, ".jpg")  # type: ignore[misc]
        return files

    def finish(
        self, folder: PredictionFolder, class_names: Mapping[int, str], choice: Choice
    ) -> None:
        """Write the table, of what the folder holds so far.

        Args:
            folder: before its end.
            class_names: by category id.
            choice: has the score threshold.

        Raises:
            OSError: it cannot be written.
        """
        if self.csv:
            rows = _rows(folder.lines(), class_names, choice.score_threshold)
            write_csv(folder.path / CSV_FILE, _COLUMNS, rows)


def class_folders(class_names: Sequence[str]) -> list[str]:
    """A name of a folder for each class, safe for any file system and different from the others."""
    unique = UniqueStems()
    return [
        unique.add(re.sub(r"[^\w .()+-]", "_", name).strip(" .") or "class") for name in class_names
    ]


def yolo_text(detections: ArrayDetections, height: int, width: int) -> str:
    """A line for each: class, centre x and y, width, height (shares of the image) and score."""
    sides = np.array([width, height] * 2)
    corners = detections.boxes.astype(np.float64) / sides
    centres = (corners[:, :2] + corners[:, 2:]) / 2
    rows = np.concatenate([centres, corners[:, 2:] - corners[:, :2]], axis=1).tolist()
    return "".join(
        f"{index} " + " ".join(f"{x:.6f}" for x in (*row, score)) + "\n"
        for index, row, score in zip(
            detections.classes.tolist(), rows, detections.scores.tolist(), strict=True
        )
    )


def _crops(pixels: Pixels, detections: ArrayDetections) -> Iterator[tuple[Pixels, int]]:
    """The pixels that a box touches, at least one, and its class."""
    height, width = pixels.shape[:2]
    for box, index in zip(detections.boxes.tolist(), detections.classes.tolist(), strict=True):
        left, top = min(int(box[0]), width - 1), min(int(box[1]), height - 1)
        right, bottom = (
            max(int(np.ceil(x)), least + 1) for x, least in zip(box[2:], (left, top), strict=True)
        )
        yield pixels[top:bottom, left:right], index


def _rows(
    lines: Iterator[dict[str, Any]], class_names: Mapping[int, str], score_threshold: float
) -> Iterator[list[Any]]:
    for line in lines:
        image = line.get("image", {})
        for entry in line.get("annotations", ()):
            if entry["score"] < score_threshold:
                continue
            left, top, width, height = entry["bbox"]
            yield [
                *(image["file_name"], image.get("frame"), image.get("seconds")),
                *(class_names[entry["category_id"]], entry["category_id"], entry["score"]),
                *(left, top, left + width, top + height),
                *(entry["exit_stage"], entry.get("track_id")),
            ]

"""Predictions for image files as pictures and one json; needs no PyTorch for an exported file."""

from __future__ import annotations

import functools
import glob
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from tqdm import tqdm

from cascade_det.commands.prediction_files import PredictionFolder
from cascade_det.data.coco_results import coco_results, encode_masks
from cascade_det.data.given_images import Image
from cascade_det.data.image_names import IMAGE_SUFFIXES
from cascade_det.data.read_ahead import read_ahead
from cascade_det.data.transforms import Pixels, read_image
from cascade_det.errors import DatasetError
from cascade_det.onnx_predictor import ArrayDetections, OnnxPredictor
from cascade_det.parallel.signals import INTERRUPTED, handled, let_go_of_lost_terminal, stop_signals
from cascade_det.report.drawing import draw_detections, encode
from cascade_det.report.label_drawing import draw_labels
from cascade_det.text import printable

if TYPE_CHECKING:
    from cascade_det.standalone import Predictor, SegmenterPredictor, SlicedPredictor

AnyPredictor: TypeAlias = "Predictor | SlicedPredictor | OnnxPredictor | SegmenterPredictor"
# Detections, and the contents of files by key.
_Results: TypeAlias = tuple[Sequence[dict[str, Any]], Mapping[str, Callable[[], bytes]]]

MOST_SHOWN = 20  # failed files on the terminal


def find_images(patterns: list[str]) -> list[Path]:
    """Image files from names of files, of folders and globs; in order, each once.

    A name that exists is not a glob, even with brackets in it; nor are existing folders at the
    start of a glob.

    Raises:
        DatasetError: a pattern matches no image.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        paths = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(_escaped(path)))]
        images = [image for path in paths for image in _images_at(path)]
        if not images:
            raise DatasetError(
                f"--input {pattern}: is neither an existing file nor a folder with images"
            )
        found.update(dict.fromkeys(images))
    return list(found)


def _escaped(path: Path) -> str:
    """The glob with its existing leading folders escaped."""
    folder = next((parent for parent in path.parents if parent.exists()), Path())
    return os.path.join(glob.escape(str(folder)), path.relative_to(folder))


def predict(
    predictor: Predictor | SlicedPredictor | OnnxPredictor,
    files: list[Path],
    output: Path,
    score_threshold: float,
    *,
    with_stages: bool = False,
    others: Sequence[str] = (),
) -> int:
    """Write a picture of every image with its detections, and one ``predictions.json``.

    Args:
        predictor: the detector.
        files: image files; image ids count them from 1.
        output: folder, made if missing.
        score_threshold: detections below it are in the json, but not drawn.
        with_stages: also draw exit stages.
        others: names of files that the detector itself writes to the folder.

    Returns:
        As ``write_predictions``, also errors.
    """

    def results(number: int, image: Pixels, found: object) -> _Results:
        detections = _arrays(found)
        masks = encode_masks(detections, *image.shape[:2])
        return coco_results(detections, number + 1, predictor.category_ids, masks), {
            "picture": lambda: encode(draw(image, detections), ".jpg")
        }

    draw = functools.partial(
        draw_detections,
        class_names=predictor.class_names,
        score_threshold=score_threshold,
        with_stages=with_stages,
    )
    folder = PredictionFolder(output, files, _categories(predictor), others)
    return write_predictions(predictor, folder, results)


def segment(predictor: SegmenterPredictor, files: list[Path], output: Path) -> int:
    """Write a picture and a label image of every image, and one ``predictions.json``.

    Args and results as ``predict``. The label image, a grey PNG, has the class of every pixel: 8
    bits, or 16 with more than 255 classes.
    """

    def results(number: int, image: Pixels, labels: Any) -> _Results:
        return [], {
            "picture": lambda: encode(draw_labels(image, labels, predictor.class_names), ".jpg"),
            "labels": lambda: encode(labels, ".png"),
        }

    folder = PredictionFolder(output, files, _categories(predictor), labels=True)
    return write_predictions(predictor, folder, results)


def write_predictions(
    predictor: AnyPredictor,
    folder: PredictionFolder,
    results: Callable[[int, Pixels, Any], _Results],
) -> int:
    """Write what a predictor finds in the files of a folder, and one ``predictions.json``.

    Files that cannot be read are skipped, reported at the end and listed in the json under
    ``failed``, as ``{"file_name", "reason"}``. So are images of which a file cannot be written;
    their other results are kept. After Ctrl-C or a stop signal the json holds the images done so
    far. During the run they are in ``predictions.jsonl``.

    Args:
        predictor: the detector or segmenter.
        folder: new.
        results: of the number of a file, its pixels and what was found there: the detections in
            COCO's format, and the content of its files, see ``PredictionFolder.add``.

    Returns:
        The exit status: 0, 1 if a file failed, or 128 plus the number of the signal that ended
        the run (130 after Ctrl-C).

    Raises:
        DatasetError: a file would replace an input, or one that no earlier run made.
    """
    failures: list[str] = []  # the first MOST_SHOWN
    status, ending = None, _Ending()
    files = folder.files
    with handled(dict.fromkeys(stop_signals(), ending.receive)), folder:
        found_by_file = tqdm(_find(predictor, files), total=len(files), disable=None, unit="img")
        try:
            ending.at_once()
            for number, found in enumerate(found_by_file):
                reason = _keep(folder, number, found, results)
                if reason is not None and len(failures) < MOST_SHOWN:
                    failures.append(f"{files[number]}: {reason}")
        except KeyboardInterrupt:
            status = ending.status or INTERRUPTED
        finally:
            ending.later()
    print(f"{folder.summary}: {printable(str(folder.path))}")
    if status is not None:
        print(f"Interrupted: {len(files) - folder.seen} images are not done.", file=sys.stderr)
    _print_failures(failures, folder.failed)
    return int(folder.failed > 0) if status is None else status


def _categories(predictor: AnyPredictor) -> list[dict[str, Any]]:
    return [
        {"id": category_id, "name": name}
        for category_id, name in zip(predictor.category_ids, predictor.class_names, strict=True)
    ]


def _keep(
    folder: PredictionFolder,
    number: int,
    found: tuple[Pixels, Any] | DatasetError,
    results: Callable[[int, Pixels, Any], _Results],
) -> str | None:
    """Write an image's results; returns the reason of a failure."""
    if isinstance(found, DatasetError):
        reason = str(found).removeprefix(f"{folder.files[number]}: ")
        folder.fail(number, reason)
        return reason
    image, prediction = found
    height, width = image.shape[:2]
    return folder.add(number, (height, width), *results(number, image, prediction))


class _Ending:
    """Handles stop signals; a second Ctrl-C raises KeyboardInterrupt anywhere.

    Attributes:
        status: the exit status after the first signal; ``None`` before.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        self._at_once = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            let_go_of_lost_terminal()
        first, self.status = self.status is None, self.status or 128 + number
        # Cluster managers may send other signals several times for one stop.
        if (first and self._at_once) or (number == signal.SIGINT and not first):
            raise KeyboardInterrupt

    def at_once(self) -> None:
        """From now on the first signal raises KeyboardInterrupt, as does one already received."""
        self._at_once = True
        if self.status is not None:
            raise KeyboardInterrupt

    def later(self) -> None:
        """From now on the first signal is only remembered, since results are being saved."""
        self._at_once = False


def _find(
    predictor: AnyPredictor, files: Sequence[Path]
) -> Iterator[tuple[Pixels, Any] | DatasetError]:
    """Yield each file's pixels and its prediction, or the error of reading it; batch by batch."""
    size = predictor.batch_size
    parts = [files[start : start + size] for start in range(0, len(files), size)]
    # Reads the next batch while this one is processed.
    batches = read_ahead(lambda part: [_read(file) for file in part], parts)
    for part, batch in zip(parts, batches, strict=True):
        images: list[Image] = [i for i in batch if not isinstance(i, DatasetError)]
        names = [
            str(f) for f, i in zip(part, batch, strict=True) if not isinstance(i, DatasetError)
        ]
        predictions = iter(predictor(images, names=names))
        for image in batch:
            yield image if isinstance(image, DatasetError) else (image, next(predictions))


def _arrays(detections: object) -> ArrayDetections:
    columns: dict[str, Any] = {
        name: None if column is None else np.asarray(column)
        for name, column in vars(detections).items()
    }
    return ArrayDetections(**columns)


def _read(file: Path) -> Pixels | DatasetError:
    try:
        return read_image(str(file), "BGR")
    except DatasetError as error:
        return error


def _print_failures(failures: list[str], count: int) -> None:
    if count:
        print(f"{count} files could not be read, or their pictures written:", file=sys.stderr)
    for failure in failures:
        print(f"  - {printable(failure)}", file=sys.stderr)
    if count > len(failures):
        print("  - ... the others are in predictions.json, failed", file=sys.stderr)


def _images_at(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    return [path] if path.is_file() else []

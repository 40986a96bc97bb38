"""Detections of image files as annotated pictures and one COCO-format json; needs no PyTorch."""

from __future__ import annotations

import functools
import glob
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from cascade_det.commands.prediction_files import PredictionFolder
from cascade_det.data.coco_results import coco_results, encode_masks
from cascade_det.data.given_images import Image
from cascade_det.data.read_ahead import read_ahead
from cascade_det.data.transforms import read_image
from cascade_det.errors import DatasetError
from cascade_det.onnx_predictor import ArrayDetections, OnnxPredictor
from cascade_det.parallel.signals import INTERRUPTED, handled, let_go_of_lost_terminal, stop_signals
from cascade_det.report.drawing import draw_detections, encode
from cascade_det.text import printable

if TYPE_CHECKING:
    from cascade_det.standalone import Predictor

MOST_SHOWN = 20  # failed files on the terminal
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


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
    predictor: Predictor | OnnxPredictor,
    files: list[Path],
    output: Path,
    score_threshold: float,
    *,
    with_stages: bool = False,
    others: Sequence[str] = (),
) -> int:
    """Write a picture of every image, and one ``predictions.json``.

    Files that cannot be read are skipped, reported at the end and listed in the json under
    ``failed``, as ``{"file_name", "reason"}``. So are images whose picture cannot be written;
    their detections are kept. After Ctrl-C or a stop signal the json holds the images done so
    far. During the run they are in ``predictions.jsonl``.

    Args:
        predictor: the detector.
        files: image files; image ids count them from 1.
        output: folder, made if missing.
        score_threshold: detections below it are in the json, but not drawn.
        with_stages: also draw exit stages.
        others: names of files that the detector itself writes to the folder.

    Returns:
        The exit status: 0, 1 if a file failed, or 128 plus the number of the signal that ended
        the run (130 after Ctrl-C).

    Raises:
        DatasetError: a picture would replace an input, or a file that no earlier run made.
    """
    categories = [
        {"id": category_id, "name": name}
        for category_id, name in zip(predictor.category_ids, predictor.class_names, strict=True)
    ]
    failures: list[str] = []  # the first MOST_SHOWN
    status, ending = None, _Ending()
    draw = functools.partial(
        draw_detections,
        class_names=predictor.class_names,
        score_threshold=score_threshold,
        with_stages=with_stages,
    )
    with (
        handled(dict.fromkeys(stop_signals(), ending.receive)),
        PredictionFolder(output, files, categories, others) as folder,
    ):
        results = tqdm(_detect(predictor, files), total=len(files), disable=None, unit="img")
        try:
            ending.at_once()
            for number, found in enumerate(results):
                reason = _keep(folder, number, found, predictor.category_ids, draw)
                if reason is not None and len(failures) < MOST_SHOWN:
                    failures.append(f"{files[number]}: {reason}")
        except KeyboardInterrupt:
            status = ending.status or INTERRUPTED
        finally:
            ending.later()
    print(f"{folder.done} images, {folder.detections} detections: {printable(str(output))}")
    if status is not None:
        print(f"Interrupted: {len(files) - folder.seen} images are not done.", file=sys.stderr)
    _print_failures(failures, folder.failed)
    return int(folder.failed > 0) if status is None else status


def _keep(
    folder: PredictionFolder,
    number: int,
    found: tuple[np.ndarray, ArrayDetections] | DatasetError,
    category_ids: Sequence[int],
    draw: Callable[..., np.ndarray],
) -> str | None:
    """Write an image's results; returns the reason of a failure."""
    if isinstance(found, DatasetError):
        reason = str(found).removeprefix(f"{folder.files[number]}: ")
        folder.fail(number, reason)
        return reason
    image, detections = found
    height, width = image.shape[:2]
    masks = encode_masks(detections, height, width)
    results = coco_results(detections, number + 1, category_ids, masks)
    return folder.add(
        number, (height, width), results, lambda: encode(draw(image, detections), ".jpg")
    )


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


def _detect(
    predictor: Predictor | OnnxPredictor, files: list[Path]
) -> Iterator[tuple[np.ndarray, ArrayDetections] | DatasetError]:
    """Yield each file's pixels and detections, or the error of reading it; batch by batch."""
    size = predictor.batch_size
    parts = [files[start : start + size] for start in range(0, len(files), size)]
    # Reads the next batch while this one is processed.
    batches = read_ahead(lambda part: [_read(file) for file in part], parts)
    for part, batch in zip(parts, batches, strict=True):
        images: list[Image] = [i for i in batch if not isinstance(i, DatasetError)]
        names = [
            str(f) for f, i in zip(part, batch, strict=True) if not isinstance(i, DatasetError)
        ]
        detections = iter(predictor(images, names=names))
        for image in batch:
            yield image if isinstance(image, DatasetError) else (image, _arrays(next(detections)))


def _arrays(detections: object) -> ArrayDetections:
    columns: dict[str, Any] = {
        name: None if column is None else np.asarray(column)
        for name, column in vars(detections).items()
    }
    return ArrayDetections(**columns)


def _read(file: Path) -> npt.NDArray[np.uint8] | DatasetError:
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

"""An analysis as tables and pictures in a folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade_det.files import atomic_path, write_csv
from cascade_det.report.confusion_plot import plot_confusion
from cascade_det.report.drawing import encode
from cascade_det.report.mistakes import draw_mistakes

logger = logging.getLogger(__name__)

FOLDER = "analysis"
_AT_SCORE = ("score", "precision", "recall", "F1", "true_positives", "false_positives", "misses")
_PICTURES = "worst_images"

ReadImage = Callable[[str], npt.NDArray[np.uint8]]
Draw = Callable[[], npt.NDArray[np.uint8]]


def write_analysis(
    analysis: Mapping[str, Any],
    output_dir: str | os.PathLike[str],
    *,
    read_image: ReadImage | None = None,
) -> Path:
    """Write ``analysis/`` in the folder of a run, replacing files of an earlier evaluation.

    ``per_class.csv``, ``confusion_matrix.csv``, ``worst_images.csv``, ``confusion_matrix.png``
    and, with ``read_image``, ``worst_images/01.jpg`` and so on, in the order of that table.
    A nan is an empty cell. A file that cannot be written is a warning, see :func:`as_extra`.

    Args:
        analysis: see ``analysis.analyze``.
        output_dir: the folder of the run.
        read_image: returns the pixels, uint8 ``[H, W, 3]`` BGR, of a ``file_name`` of the ground
            truth.

    Returns:
        The folder.
    """
    folder = Path(output_dir) / FOLDER
    with as_extra(folder / "per_class.csv") as path:
        of_class = ("class", "category_id", "objects", "AP", "AP50", "AP75", *_AT_SCORE)
        rows = [
            [*(row[name] for name in of_class), *(row["best"][name] for name in _AT_SCORE)]
            for row in analysis["per_class"]
        ]
        write_csv(path, [*of_class, *(f"best_{name}" for name in _AT_SCORE)], rows)
    classes, counts = (analysis["confusion_matrix"][key] for key in ("classes", "counts"))
    with as_extra(folder / "confusion_matrix.csv") as path:
        rows = [[name, *row] for name, row in zip(classes, counts, strict=True)]
        write_csv(path, ["true \\ detected", *classes], rows)
    with as_extra(folder / "confusion_matrix.png") as path:
        plot_confusion(classes, np.array(counts), path)
    worst = analysis["worst_images"]
    pictures = _draw_worst(worst, folder, read_image)
    columns = ("image_id", "file_name", "true_positives", "false_positives", "misses", "F1")
    with as_extra(folder / "worst_images.csv") as path:
        rows = [
            [*(image[key] for key in columns), picture]
            for image, picture in zip(worst, pictures, strict=True)
        ]
        write_csv(path, [*columns, "picture"], rows)
    return folder


@contextmanager
def as_extra(path: Path) -> Iterator[Path]:
    """Turn an error while writing ``path`` into a warning, so that no metrics are lost."""
    try:
        yield path
    except Exception as error:
        logger.warning("%s was not written: %s: %s", path, type(error).__name__, error)


def _draw_worst(
    worst: Sequence[Mapping[str, Any]], folder: Path, read_image: ReadImage | None
) -> list[str]:
    if read_image is None:
        write_pictures(folder, [])
        return [""] * len(worst)

    def draw(image: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
        return draw_mistakes(read_image(image["file_name"]), image)

    return write_pictures(folder, [partial(draw, image) for image in worst])


def write_pictures(folder: Path, pictures: Sequence[Draw]) -> list[str]:
    """Write ``worst_images/01.jpg`` and so on, in place of those of an earlier evaluation.

    Args:
        folder: of the analysis.
        pictures: return BGR pixels, uint8 ``[H, W, 3]``.

    Returns:
        The name of each picture in the folder; empty if it was not written, see :func:`as_extra`.
    """
    with as_extra(folder / _PICTURES):
        for old in (folder / _PICTURES).glob("[0-9][0-9].jpg"):
            old.unlink()
    names = [""] * len(pictures)
    for index, draw in enumerate(pictures):
        name = f"{_PICTURES}/{index + 1:02d}.jpg"
        with as_extra(folder / name) as path:
            content = encode(draw(), ".jpg")
            with atomic_path(path) as temporary:
                temporary.write_bytes(content)
            names[index] = name
    return names

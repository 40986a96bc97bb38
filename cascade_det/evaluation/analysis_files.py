"""An analysis as tables and pictures in a folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from cascade_det.errors import DatasetError
from cascade_det.evaluation.confusion_picture import plot_confusion
from cascade_det.evaluation.mistake_picture import draw_mistakes
from cascade_det.files import atomic_path, write_csv

logger = logging.getLogger(__name__)

FOLDER = "analysis"
_AT_SCORE = ("score", "precision", "recall", "F1", "true_positives", "false_positives", "misses")
_PICTURES = "worst_images"

ReadImage = Callable[[str], npt.NDArray[np.uint8]]


def write_analysis(
    analysis: Mapping[str, Any],
    output_dir: str | os.PathLike[str],
    *,
    read_image: ReadImage | None = None,
) -> Path:
    """Write ``analysis/`` below a folder; what an earlier evaluation left there is replaced.

    ``per_class.csv``, ``confusion_matrix.csv``, ``worst_images.csv``, ``confusion_matrix.png``
    and, with ``read_image``, ``worst_images/01.jpg`` and so on, in the order of that table.
    A nan is an empty cell. A picture whose image cannot be read is left out, with a warning.

    Args:
        analysis: see ``analysis.analyse``.
        output_dir: the folder of the run.
        read_image: the pixels, uint8 ``[H, W, 3]`` BGR, of a ``file_name`` of the ground truth.

    Returns:
        The folder.
    """
    folder = Path(output_dir) / FOLDER
    write_csv(folder / "per_class.csv", *_class_table(analysis["per_class"]))
    matrix = analysis["confusion_matrix"]
    rows = [[name, *row] for name, row in zip(matrix["classes"], matrix["counts"], strict=True)]
    write_csv(folder / "confusion_matrix.csv", ["true \\ detected", *matrix["classes"]], rows)
    plot_confusion(matrix["classes"], np.array(matrix["counts"]), folder / "confusion_matrix.png")
    worst = analysis["worst_images"]
    for old in (folder / _PICTURES).glob("[0-9][0-9].jpg"):
        old.unlink()
    pictures = [""] * len(worst)
    if read_image is not None:
        pictures = [
            _write_picture(image, folder, f"{_PICTURES}/{number:02d}.jpg", read_image)
            for number, image in enumerate(worst, start=1)
        ]
    columns = ("image_id", "file_name", "true_positives", "false_positives", "misses", "F1")
    write_csv(
        folder / "worst_images.csv",
        [*columns, "picture"],
        ([*(i[key] for key in columns), name] for i, name in zip(worst, pictures, strict=True)),
    )
    return folder


def _class_table(per_class: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list]]:
    columns = ("class", "category_id", "objects", "AP", "AP50", "AP75", *_AT_SCORE)
    headers = [*columns, *(f"best_{name}" for name in _AT_SCORE)]
    rows = [
        [*(row[name] for name in columns), *(row["best"][name] for name in _AT_SCORE)]
        for row in per_class
    ]
    return headers, rows


def _write_picture(image: Mapping[str, Any], folder: Path, name: str, read_image: ReadImage) -> str:
    """The name of the picture; empty where there is none."""
    try:
        pixels = read_image(image["file_name"])
    except DatasetError as error:
        logger.warning("No picture of the mistakes in image %s: %s", image["image_id"], error)
        return ""
    encoded = cv2.imencode(".jpg", draw_mistakes(pixels, image))[1]
    with atomic_path(folder / name) as temporary:
        temporary.write_bytes(encoded.tobytes())
    return name

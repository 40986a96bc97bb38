"""The analysis of a segmenter as tables and pictures in a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cascade_det.files import write_csv
from cascade_det.report.analysis_files import FOLDER, Draw, as_extra, write_pictures
from cascade_det.report.confusion_plot import plot_pixel_confusion


def write_semantic_analysis(
    results: Mapping[str, Any], output_dir: str | os.PathLike[str], pictures: Sequence[Draw]
) -> Path:
    """Write ``analysis/`` in the folder of a run, replacing files of an earlier evaluation.

    ``per_class.csv``, ``confusion_matrix.csv``, ``worst_images.csv``, ``confusion_matrix.png``
    and ``worst_images/01.jpg`` and so on, in the order of that table. A nan is an empty cell. A
    file that cannot be written is a warning.

    Args:
        results: ``sem_seg`` and ``sem_seg_analysis``, see ``SemanticEvaluator.evaluate``.
        output_dir: the folder of the run.
        pictures: draw the worst images.

    Returns:
        The folder.
    """
    folder = Path(output_dir) / FOLDER
    metrics, analysis = results["sem_seg"], results["sem_seg_analysis"]
    classes = analysis["confusion_matrix"]["classes"]
    counts = np.array(analysis["confusion_matrix"]["counts"])
    with as_extra(folder / "per_class.csv") as path:
        true, predicted = counts.sum(axis=1).tolist(), counts.sum(axis=0).tolist()
        rows: list[Sequence[Any]] = [
            [name, label, true[label], predicted[label], *_of_class(metrics, name)]
            for label, name in enumerate(classes)
        ]
        headers = ("class", "label", "pixels", "predicted_pixels", "IoU", "accuracy")
        write_csv(path, headers, rows)
    with as_extra(folder / "confusion_matrix.csv") as path:
        rows = [[name, *row] for name, row in zip(classes, counts.tolist(), strict=True)]
        write_csv(path, ["true \\ predicted", *classes], rows)
    with as_extra(folder / "confusion_matrix.png") as path:
        plot_pixel_confusion(classes, counts, path)
    names = write_pictures(folder, pictures)
    columns = ("image_id", "file_name", "mIoU", "pACC")
    with as_extra(folder / "worst_images.csv") as path:
        rows = [
            [*(image[key] for key in columns), name]
            for image, name in zip(analysis["worst_images"], names, strict=True)
        ]
        write_csv(path, [*columns, "picture"], rows)
    return folder


def _of_class(metrics: Mapping[str, float], name: str) -> tuple[float, float]:
    return metrics[f"IoU-{name}"], metrics[f"ACC-{name}"]

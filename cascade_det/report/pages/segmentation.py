"""What a segmenter predicted: IoU of classes and levels, confused classes, the worst images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2

from cascade_det.report.analysis_files import FOLDER
from cascade_det.report.pages.bar_charts import bar_chart, row_chart
from cascade_det.report.pages.charts import Chart
from cascade_det.report.pages.detections import confusion_section
from cascade_det.report.pages.page import Folded, Pictures, Plots, Section
from cascade_det.report.pages.pictures import MOST_PICTURES, SHOWN_PICTURES, small_picture
from cascade_det.report.pages.work import shown
from cascade_det.report.tables import Metrics

_MOST_BARS = 20  # Of classes in the chart: those with the lowest IoU.


def segmentation_sections(
    results: Metrics, texts: Mapping[str, Sequence[str]], folder: Path
) -> Iterator[Section]:
    """Sections of the classes, levels and worst images of a segmenter; empty for a detector.

    Args:
        results: of an evaluation.
        texts: see ``report.text.report_sections``.
        folder: of the run, with the pictures of ``analysis/``.
    """
    pixels = Section("pixels", "Classes and levels", shown(texts["pixels"]))
    if charts := list(_charts(results)):
        pixels.blocks.insert(0, Plots(charts))
    yield pixels
    analysis = results.get("sem_seg_analysis") or {}
    yield confusion_section(analysis.get("confusion_matrix"), "predicted as")
    worst = Section("worst", "Images with the lowest mean IoU")
    if images := analysis.get("worst_images"):
        worst.blocks += _pictures(images[:MOST_PICTURES], folder)
    yield worst


def _charts(results: Metrics) -> Iterator[Chart]:
    if metrics := results.get("sem_seg"):
        ious = {
            name.removeprefix("IoU-"): value
            for name, value in metrics.items()
            if name.startswith("IoU-") and not math.isnan(value)
        }
        lowest = sorted(ious, key=ious.__getitem__)[:_MOST_BARS]
        names = [name for name in ious if name in lowest]
        title = "IoU of pixels"
        if len(names) < len(ious):
            title += f", the lowest of {len(ious)} classes"
        groups = [("IoU", "blue", [ious[name] for name in names])]
        yield row_chart(title, names, groups, x_label="%", most=112)
    if levels := results.get("levels"):
        names = list(levels)
        scores = [levels[name]["mIoU"] for name in names]
        title = "Mean IoU if the decoder stopped after a level"
        yield bar_chart(title, names, [("mean IoU", "blue", scores)], y_label="%", most=112)
        entered = [100 * levels[name]["entered"] for name in names]
        left = [100 * levels[name]["left"] for name in names]
        groups = [("computed", "blue", entered), ("end here", "green", left)]
        yield bar_chart("Pixels of each level", names, groups, y_label="%", most=112)


def _pictures(images: Sequence[Mapping[str, Any]], folder: Path) -> Iterator[Any]:
    """Pictures that the evaluation has drawn: nothing else has the predictions."""
    pictures = []
    for number, image in enumerate(images, start=1):
        file = folder / FOLDER / "worst_images" / f"{number:02d}.jpg"
        picture = cv2.imread(str(file)) if file.is_file() else None
        if picture is not None:
            caption = f"{image['file_name']}: mean IoU {image['mIoU']:.1f} %"
            pictures.append(small_picture(picture, caption))
    yield "Truth on the left, prediction on the right."
    yield Pictures(pictures[:SHOWN_PICTURES])
    if further := pictures[SHOWN_PICTURES:]:
        yield Folded(f"{len(further)} more images", [Pictures(further)])
    if len(pictures) < len(images):
        yield f"{len(images) - len(pictures)} pictures of {FOLDER}/worst_images are missing."

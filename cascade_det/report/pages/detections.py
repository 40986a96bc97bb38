"""What a detector found: AP, curves, confused classes and the worst images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade_det.report.pages.charts import Chart
from cascade_det.report.pages.line_charts import Line, line_chart
from cascade_det.report.pages.page import Folded, Heat, Pictures, Plots, Section
from cascade_det.report.pages.pictures import MOST_PICTURES, SHOWN_PICTURES, side_by_side
from cascade_det.report.pages.work import shown
from cascade_det.report.tables import Metrics
from cascade_det.text import printable

# Of more classes, those with the most objects have charts.
_MOST_CHARTS = 12
_LONGEST_TITLE = 60
_OF_MEANS = {"AP": "blue", "AP50": "green", "AP75": "orange"}
_SAME_IMAGES = (
    "The best score of each class was chosen on these same images, and its F1 is reported on them "
    "too: on other images expect a little less. To choose thresholds for use, evaluate on "
    "validation images, and report their precision and recall on a test set."
)

ReadImage = Callable[[str], npt.NDArray[np.uint8]]


def detection_sections(
    results: Metrics, texts: Mapping[str, Sequence[str]], read_image: ReadImage | None
) -> Iterator[Section]:
    """Sections of AP, curves, confusion and the worst images; a section may be empty.

    Args:
        results: of an evaluation.
        texts: see ``report.text.report_sections``.
        read_image: see ``report.analysis_files.write_analysis``.
    """
    analysis = results.get("analysis") or {}
    yield Section("ap", "Average precision", shown(texts["ap"]))
    classes = Section("classes", "Precision and recall", shown(texts["classes"]))
    if analysis:
        classes.blocks.append(_SAME_IMAGES)
    yield classes
    yield Section("curves", "Curves", list(_curves(analysis)) if analysis else [])
    yield confusion_section(analysis.get("confusion_matrix"), "detected as")
    yield _worst_section(analysis, read_image)


def confusion_section(confusion: Metrics | None, column: str) -> Section:
    """Counts of true by predicted classes, coloured by their share of the true class."""
    section = Section("confusion", "Confusion matrix")
    if confusion:
        section.blocks.append(Heat.of(confusion["classes"], confusion["counts"], column))
    return section


def _curves(analysis: Metrics) -> Iterator[Any]:
    curves = analysis.get("curves")
    if not curves:
        yield (
            "These results are of an earlier version, without curves. `cascade-det report` makes "
            "them from the predictions if it is given the annotations (--json)."
        )
        return
    kind = "mask" if analysis["task"] == "segm" else "box"
    recalls = curves["recalls"]
    means = [
        Line(name, list(zip(recalls, curves[f"precision_{name}"], strict=False)), color)
        for name, color in _OF_MEANS.items()
    ]
    best = analysis["overall"][1]
    f1 = list(zip(curves["scores"], curves["F1"], strict=True))
    yield Plots(
        [
            line_chart(
                f"Precision over recall ({kind}), mean of the classes",
                means,
                x_label="recall (%)",
                y_label="precision (%)",
                x_range=(0, 100),
                y_range=(0, 100),
            ),
            _f1_chart(f"F1 over the score at {kind} IoU {best['IoU']}, all classes", f1, best),
        ]
    )
    pairs = zip(analysis["per_class"], curves["per_class"], strict=True)
    drawn = [(row, of_class) for row, of_class in pairs if of_class["precision"]]
    if not drawn:
        return
    common = sorted(drawn, key=lambda pair: -pair[0]["objects"])[:_MOST_CHARTS]
    common.sort(key=lambda pair: pair[0]["AP"])
    charts = [_class_chart(row, of_class, curves) for row, of_class in common]
    yield (
        f"Each class, at {kind} IoU {best['IoU']}: precision over recall (blue), and F1 over the "
        f"score (orange), whose dot is the best F1. {_which(len(charts), len(drawn))}"
    )
    yield Plots(charts, small=True)


def _which(shown: int, classes: int) -> str:
    if shown == classes:
        return "The lowest AP comes first."
    return f"Those {shown} of {classes} classes with the most objects are shown, lowest AP first."


def _f1_chart(title: str, points: list[tuple[float, float]], best: Metrics) -> Chart:
    return line_chart(
        title,
        [Line("", points, "orange"), _best_dot(best, 1)],
        x_label="least score",
        y_label="F1 (%)",
        x_range=(min(points[0][0], 0), max(points[-1][0], 1)),
        y_range=(0, 100),
    )


def _best_dot(best: Metrics, scale: float) -> Line:
    text = f"F1 {best['F1']:.1f} at {best['score']:.3f}"
    at = [(scale * best["score"], best["F1"])]
    return Line("", at, "orange", dots="only", texts=[text], names=True)


def _class_chart(row: Metrics, of_class: Metrics, curves: Metrics) -> Chart:
    """Precision and F1 share an axis: recall in percent, and the score in hundredths."""
    scores = [100 * score for score in curves["scores"]]
    return line_chart(
        f"{printable(row['class'], longest=_LONGEST_TITLE)}: AP {row['AP']:.1f}, "
        f"{row['objects']:,} objects",
        [
            Line("precision", list(zip(curves["recalls"], of_class["precision"], strict=True)),
                 "blue"),
            Line("F1", list(zip(scores, of_class["F1"], strict=True)), "orange", dashed=True),
            _best_dot(row["best"], 100),
        ],
        x_label="recall (%), or score in hundredths",
        y_label="%",
        x_range=(0, 100),
        y_range=(0, 100),
        small=True,
    )  # fmt: skip


def _worst_section(analysis: Metrics, read_image: ReadImage | None) -> Section:
    section = Section("worst", "Images with the most mistakes")
    worst = analysis.get("worst_images", [])[:MOST_PICTURES]
    if not worst:
        return section
    threshold = analysis["overall"][0]
    section.blocks.append(
        "Objects on the left: found ones are green, missed ones yellow. Detections with a score of "
        f"{threshold['score']:g} or more on the right: green ones found an object of their class "
        f"(IoU {threshold['IoU']}), red ones did not."
    )
    pictures, failed = [], []
    for image in worst:
        caption = (
            f"{image['file_name'] or image['image_id']}: {image['false_positives']} false, "
            f"{image['misses']} missed, F1 {image['F1']:.0f} %"
        )
        try:
            if read_image is None:
                raise ValueError("no folder of images is known (--images)")
            pictures.append(side_by_side(read_image(image["file_name"]), image, caption))
        # An image that is gone must not cost the rest of the page.
        except Exception as error:
            failed.append(f"{caption} ({error})")
    section.blocks.append(Pictures(pictures[:SHOWN_PICTURES]))
    if further := pictures[SHOWN_PICTURES:]:
        section.blocks.append(Folded(f"{len(further)} more images", [Pictures(further)]))
    if failed:
        text = "\n".join(failed)
        section.blocks.append(Folded(f"{len(failed)} images cannot be shown", [text]))
    return section

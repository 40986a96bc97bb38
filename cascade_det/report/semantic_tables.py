"""Tables of a segmenter's metrics."""

from __future__ import annotations

from cascade_det.report.tables import Metrics, shown_name, table

_OVERALL = ("mIoU", "fwIoU", "mACC", "pACC")
_OF_VOLUMES = ("Dice", "HD95", "Jaccard", "ASSD")
_MOST_CONFUSED = 5
_MOST_IMAGES = 5
_VOLUMES = {"volumes": "as published", "volumes_strict": "a missed organ counts"}


def semantic_sections(results: Metrics) -> list[str]:
    """Tables of what results have of a segmenter."""
    sections: list[str] = []
    if metrics := results.get("sem_seg"):
        row = [metrics[name] for name in _OVERALL]
        sections.append(table("Semantic segmentation (%)", _OVERALL, [row], ".1f"))
        names = [name.removeprefix("IoU-") for name in metrics if name.startswith("IoU-")]
        rows = [(name, metrics[f"IoU-{name}"], metrics[f"ACC-{name}"]) for name in names]
        headers = "class", "IoU (%)", "accuracy (%)"
        sections.append(table("Pixels of each class", headers, rows, ("", ".1f", ".1f")))
    if levels := results.get("levels"):
        of_levels = [
            (
                name.removeprefix("level"),
                *(metrics[key] for key in _OVERALL),
                *(100 * metrics[key] for key in ("entered", "left")),
            )
            for name, metrics in levels.items()
        ]
        columns = "level", *_OVERALL, "entered (%)", "left (%)"
        title = "The whole decoder stopped after each level, and the exits"
        sections.append(table(title, columns, of_levels, ("", *[".1f"] * 6)))
    if analysis := results.get("sem_seg_analysis"):
        sections += _mistakes(analysis)
    for key, convention in _VOLUMES.items():
        if metrics := results.get(key):
            row = [metrics[name] for name in _OF_VOLUMES]
            sections.append(table(f"Volumes, {convention}", _OF_VOLUMES, [row], ".2f"))
    return sections


def _mistakes(analysis: Metrics) -> list[str]:
    """The most confused classes, and the worst images."""
    names, counts = (analysis["confusion_matrix"][key] for key in ("classes", "counts"))
    confused = sorted(
        (-count / sum(row), names[true], names[predicted])
        for true, row in enumerate(counts)
        for predicted, count in enumerate(row)
        if count and true != predicted
    )[:_MOST_CONFUSED]
    lines = []
    if confused:
        listed = ", ".join(
            f"{shown_name(true)} as {shown_name(predicted)} ({-100 * share:.1f} %)"
            for share, true, predicted in confused
        )
        lines.append(f"Most confused, of the pixels of the class: {listed}.")
    if worst := analysis["worst_images"][:_MOST_IMAGES]:
        listed = ", ".join(
            f"{shown_name(image['file_name'])} ({image['mIoU']:.1f} %)" for image in worst
        )
        lines.append(f"Images with the lowest mean IoU: {listed}.")
    return lines

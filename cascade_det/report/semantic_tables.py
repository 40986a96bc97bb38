"""Tables of a segmenter's metrics."""

from __future__ import annotations

from cascade_det.report.tables import Metrics, table

_OVERALL = ("mIoU", "fwIoU", "mACC", "pACC")
_OF_VOLUMES = ("Dice", "HD95", "Jaccard", "ASSD")
_VOLUMES = {"volumes": "as published", "volumes_strict": "a missed organ counts"}


def semantic_sections(results: Metrics) -> list[str]:
    """Tables of ``sem_seg``, ``volumes`` and ``volumes_strict``, where they are there."""
    sections = []
    if metrics := results.get("sem_seg"):
        row = [metrics[name] for name in _OVERALL]
        sections.append(table("Semantic segmentation (%)", _OVERALL, [row], ".1f"))
        names = [name.removeprefix("IoU-") for name in metrics if name.startswith("IoU-")]
        rows = [(name, metrics[f"IoU-{name}"], metrics[f"ACC-{name}"]) for name in names]
        headers = "class", "IoU (%)", "accuracy (%)"
        sections.append(table("Pixels of each class", headers, rows, ("", ".1f", ".1f")))
    for key, convention in _VOLUMES.items():
        if metrics := results.get(key):
            row = [metrics[name] for name in _OF_VOLUMES]
            sections.append(table(f"Volumes, {convention}", _OF_VOLUMES, [row], ".2f"))
    return sections

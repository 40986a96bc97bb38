"""The findings of ``check-data`` for semantic segmentation, as tables and as plain values."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from cascade_det.commands.dataset_report import classes_table, plain_issues, print_problems
from cascade_det.data.image_names import LinkRule
from cascade_det.data.semantic.check import CheckedSemantic, check_semantic
from cascade_det.data.semantic.formats import SemanticSource
from cascade_det.errors import DatasetError
from cascade_det.text import printable


@dataclass
class SemanticUse:
    """A data set to check, and what it will be used for."""

    source: SemanticSource
    links: LinkRule
    num_classes: int
    for_training: bool = False
    for_testing: bool = False


def report_semantic(use: SemanticUse, *, decode: bool) -> dict[str, Any]:
    """Check one data set and print the findings; returns them as plain values."""
    source = use.source
    labels = f", labels in {source.label_folder}" if source.label_folder else ""
    place = printable(f"{source.name}: {source.format}, {source.folder}{labels}")
    print(f"\n{place}\n", flush=True)
    try:
        checked = check_semantic(source, decode=decode, links=use.links)
    except DatasetError as error:
        print(printable(str(error), lines=True))
        return {"problems": {"no usable file": {"count": 1, "examples": [str(error)]}}}
    problems = checked.bad.copy()
    found = len(source.class_names)
    if use.num_classes != found:
        kind = "MODEL.SEM_SEG_HEAD.NUM_CLASSES is not the number of classes"
        problems.add(kind, "{}, not {}".format, use.num_classes, found)
    figures, classes = _figures(checked), _classes(source, checked)
    print(tabulate(figures.items(), tablefmt="github"), end="\n\n")
    print(classes_table(classes), end="\n\n")
    print_problems("problems", problems)
    print_problems("notes", checked.notes)
    return {
        "format": source.format,
        "folder": str(source.folder),
        "figures": figures,
        "classes": classes,
        "problems": plain_issues(problems),
        "notes": plain_issues(checked.notes),
    }


def _figures(checked: CheckedSemantic) -> dict[str, Any]:
    sizes = Counter((record.width, record.height) for record in checked.records)
    figures: dict[str, Any] = {"usable images": len(checked.records)}
    if volumes := {record.volume for record in checked.records} - {""}:
        figures["volumes that they are slices of"] = len(volumes)
    if sizes:
        by_area = sorted(sizes, key=lambda size: size[0] * size[1])
        figures["image sizes"] = len(sizes)
        figures["smallest image"], figures["largest image"] = (
            f"{width}x{height}" for width, height in (by_area[0], by_area[-1])
        )
    return figures


def _classes(source: SemanticSource, checked: CheckedSemantic) -> list[dict[str, Any]]:
    total = max(int(checked.pixels.sum()), 1)
    labels = [*map(str, range(len(source.class_names))), str(source.ignore_value)]
    return [
        {
            "label": label,
            "name": name,
            "pixels": int(pixels),
            "share of pixels": f"{pixels / total:.2%}",
            "images": int(images),
        }
        for label, name, pixels, images in zip(
            labels, [*source.class_names, "(ignored)"], checked.pixels, checked.images, strict=True
        )
    ]

"""The findings of ``check-data``, as tables and as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from cascade_det.data.catalog import DatasetSource
from cascade_det.data.coco_json import CheckedJson
from cascade_det.data.dataset_summary import DatasetSummary, summarize
from cascade_det.data.image_check import check_dataset
from cascade_det.data.image_names import LinkRule
from cascade_det.data.issues import Issues
from cascade_det.errors import DatasetError
from cascade_det.text import printable

_LONGEST_NAME = 48  # characters of a class in a table


@dataclass
class DatasetUse:
    """A data set to check, and what it will be used for."""

    source: DatasetSource
    links: LinkRule
    for_training: bool = False
    for_testing: bool = False
    num_classes: int | None = None
    masks: bool = False


def report_dataset(use: DatasetUse, *, decode: bool) -> dict[str, Any]:
    """Check one data set and print the findings; returns them as plain values."""
    source = use.source
    place = printable(f"{source.name}: {source.json_file}, images in {source.image_root}")
    print(f"\n{place}\n", flush=True)
    try:
        checked = check_dataset(source, decode=decode, links=use.links, masks=use.masks)
    except DatasetError as error:
        print(printable(str(error), lines=True))
        return {"problems": {"file that cannot be read": {"count": 1, "examples": [str(error)]}}}
    summary = summarize(checked)
    problems = _problems(use, checked, summary)
    print(tabulate(_statistics(checked, summary), tablefmt="github"), end="\n\n")
    print(classes_table(_categories(checked, summary)), end="\n\n")
    print_problems("problems", problems)
    print_problems("notes", summary.warnings)
    return {
        "json_file": str(source.json_file),
        "image_root": str(source.image_root),
        "figures": dict(_statistics(checked, summary)),
        "categories": _categories(checked, summary),
        "problems": plain_issues(problems),
        "notes": plain_issues(summary.warnings),
    }


def _problems(use: DatasetUse, checked: CheckedJson, summary: DatasetSummary) -> Issues:
    """Errors in the data set, and anything else that prevents its use."""
    problems = checked.unusable.copy()
    problems.update(checked.bad)
    found = len(checked.categories)
    if use.num_classes not in (None, found) and not checked.unusable:
        problems.add(
            "MODEL.ROI_HEADS.NUM_CLASSES is not the number of categories",
            "{}, not {}".format,
            use.num_classes,
            found,
        )
    if use.for_training and not summary.images_with_boxes:
        problems.add("nothing to train on", "no image has a box that is not a crowd".format)
    return problems


def _statistics(checked: CheckedJson, summary: DatasetSummary) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = [
        ("usable images", summary.images),
        ("with boxes", summary.images_with_boxes),
        ("boxes", summary.boxes),
        ("of them crowds", summary.crowds),
        *((f"{name} boxes", summary.areas[name]) for name in ("small", "medium", "large")),
        *((f"masks: {kind}", count) for kind, count in summary.masks.items()),
        ("categories", len(checked.categories)),
    ]
    if summary.sizes:
        by_area = sorted(summary.sizes, key=lambda size: size[0] * size[1])
        (common, count), *_ = summary.sizes.most_common(1)
        rows += [
            ("image sizes", len(summary.sizes)),
            *(
                (f"{name} image", f"{width}x{height}")
                for name, (width, height) in (("smallest", by_area[0]), ("largest", by_area[-1]))
            ),
            ("most common size", f"{common[0]}x{common[1]} ({count} images)"),
        ]
    return rows


def _categories(checked: CheckedJson, summary: DatasetSummary) -> list[dict[str, Any]]:
    return [
        {
            "id": category_id,
            "name": name,
            "boxes": summary.category_boxes[category_id],
            "images": summary.category_images[category_id],
        }
        for category_id, name in checked.categories.items()
    ]


def classes_table(categories: list[dict[str, Any]]) -> str:
    """Rows whose second column is the ``name`` of a class, as a table."""
    rows = [
        {**row, "name": printable(row["name"], longest=_LONGEST_NAME).replace("|", "\\|")}
        for row in categories
    ]
    # Classes "007" and "1e5" are not numbers.
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=[1])


def print_problems(title: str, problems: Issues) -> None:
    """Print issues with three examples of each kind."""
    if not problems:
        print(f"No {title}.\n")
        return
    rows = [
        (count, kind, "\n".join(problems.examples[kind][:3]) + "\n..." * (count > 3))
        for kind, count in problems.counts.items()
    ]
    headers = ["count", title, "such as"]
    print(tabulate(rows, headers=headers, tablefmt="grid", maxcolwidths=[None, 36, 80]), end="\n\n")


def plain_issues(problems: Issues) -> dict[str, Any]:
    """Counts and examples by kind."""
    return {
        kind: {"count": count, "examples": problems.examples[kind]}
        for kind, count in problems.counts.items()
    }

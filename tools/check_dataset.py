#!/usr/bin/env python3
"""Say what is in a data set and what is wrong with it, without training.

python tools/check_dataset.py --json train.json --images folder/
python tools/check_dataset.py --config-file ... [--decode] [KEY VALUE ...]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade_det.commands.arguments import add_config_options, check_output_file
from cascade_det.data.image_names import LINK_RULES, LinkRule

FOLLOW_LINKS = "--follow-links"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Check data sets without training; exit status 1 if something is wrong.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--json", metavar="FILE", help="COCO-format annotations")
    source.add_argument(
        "--config-file",
        action="append",
        metavar="YAML",
        help="check DATASETS.TRAIN and TEST; later files on top",
    )
    parser.add_argument("--images", metavar="FOLDER", help="of --json; its own folder if not given")
    parser.add_argument(
        "--decode",
        action="store_true",
        help="decode every image, not those of DATASETS.TEST alone: slow, finds all that is broken",
    )
    parser.add_argument(
        FOLLOW_LINKS,
        choices=LINK_RULES,
        default=LINK_RULES[0],
        help="with --json: which links out of the image folder are followed, as "
        "CASCADE.FOLLOW_LINKS says in a configuration",
    )
    parser.add_argument("--json-out", metavar="FILE", help="write the findings for programs")
    add_config_options(parser)
    args = parser.parse_args(argv)
    if args.json and args.opts:
        parser.error(f"unexpected with --json: {' '.join(args.opts)}")
    return args


if __name__ == "__main__":
    _parse(None)  # Help and errors do not wait for the imports below.

from tabulate import tabulate

from cascade_det import config
from cascade_det.commands.errors import without_traceback
from cascade_det.config import check_config, load_config
from cascade_det.data.annotation_file import read_json
from cascade_det.data.catalog import DatasetSource, dataset_of_files, find_dataset
from cascade_det.data.coco_json import CheckedJson
from cascade_det.data.dataset_check import check_dataset
from cascade_det.data.dataset_summary import DatasetSummary, summarize
from cascade_det.data.issues import Issues
from cascade_det.engine.log import setup_logging
from cascade_det.errors import CascadeDetError, ConfigError, DatasetError
from cascade_det.files import write_json
from cascade_det.text import printable

_LONGEST_NAME = 48  # characters of a class in a table


@dataclass
class Wanted:
    """A data set to check, and what it has to be good for."""

    source: DatasetSource
    links: LinkRule
    for_training: bool = False
    for_testing: bool = False
    num_classes: int | None = None


@without_traceback
def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit status is 1 where training or testing would stop."""
    args = _parse(argv)
    setup_logging()
    wanted_sets = _wanted(args)
    if args.json_out:
        files = [wanted.source.json_file for wanted in wanted_sets]
        check_output_file(Path(args.json_out), [*files, *(args.config_file or ())])
        _check_replaceable(Path(args.json_out))
    reports = {
        # Testing decodes all images before it begins, so what it would refuse is told here.
        wanted.source.name: _report(wanted, decode=args.decode or wanted.for_testing)
        for wanted in wanted_sets
    }
    if args.json_out:
        write_json(reports, args.json_out, indent=2)
    return int(any(report["problems"] for report in reports.values()))


def _check_replaceable(json_out: Path) -> None:
    """Make sure that a file holds findings, if it is there: an image is soon given by mistake."""
    if not json_out.exists():
        return
    try:
        content = read_json(json_out)
    except DatasetError:
        content = None
    reports = content.values() if isinstance(content, dict) else [content]
    if not all(isinstance(report, dict) and "problems" in report for report in reports):
        raise CascadeDetError(
            f"{json_out}: is there already, and holds no findings of this command. Give another "
            "name, or move it away."
        )


def _wanted(args: argparse.Namespace) -> list[Wanted]:
    if args.json:
        links = LinkRule(args.follow_links, FOLLOW_LINKS)
        return [Wanted(dataset_of_files(args.json, args.images), links)]
    cfg = load_config(args.config_file, args.opts)
    check_config(cfg)
    found: dict[str, Wanted] = {}
    for train in (True, False):
        arguments = config.datasets_arguments(cfg, train)
        for name in arguments["names"]:
            source = find_dataset(name, arguments["own_datasets"])
            links = LinkRule(arguments["follow_links"])
            classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
            wanted = found.setdefault(name, Wanted(source, links, num_classes=classes))
            wanted.for_training |= train
            wanted.for_testing |= not train
    if not found:
        raise ConfigError("DATASETS.TRAIN and DATASETS.TEST are empty: there is nothing to check")
    return list(found.values())


def _report(wanted: Wanted, *, decode: bool) -> dict[str, Any]:
    """Check and print one data set; returns the same as plain values."""
    source = wanted.source
    place = printable(f"{source.name}: {source.json_file}, images in {source.image_root}")
    print(f"\n{place}\n", flush=True)
    try:
        checked = check_dataset(source, decode=decode, links=wanted.links)
    except DatasetError as error:
        print(printable(str(error), lines=True))
        return {"problems": {"file that cannot be read": {"count": 1, "examples": [str(error)]}}}
    summary = summarize(checked)
    problems = _problems(wanted, checked, summary)
    print(tabulate(_figures(checked, summary), tablefmt="github"), end="\n\n")
    print(_table(_categories(checked, summary)), end="\n\n")
    _print_problems("problems", problems)
    _print_problems("notes", summary.warnings)
    return {
        "json_file": str(source.json_file),
        "image_root": str(source.image_root),
        "figures": dict(_figures(checked, summary)),
        "categories": _categories(checked, summary),
        "problems": _plain(problems),
        "notes": _plain(summary.warnings),
    }


def _problems(wanted: Wanted, checked: CheckedJson, summary: DatasetSummary) -> Issues:
    """What is wrong with the data set, and what would keep it from the use that is wanted."""
    problems = checked.unusable.copy()
    problems.update(checked.bad)
    found = len(checked.categories)
    if wanted.num_classes not in (None, found) and not checked.unusable:
        problems.add(
            "MODEL.ROI_HEADS.NUM_CLASSES is not the number of categories",
            "{}, not {}".format,
            wanted.num_classes,
            found,
        )
    if wanted.for_training and not summary.images_with_boxes:
        problems.add("nothing to train on", "no image has a box that is not a crowd".format)
    return problems


def _figures(checked: CheckedJson, summary: DatasetSummary) -> list[tuple[str, Any]]:
    rows = [
        ("usable images", summary.images),
        ("with boxes", summary.images_with_boxes),
        ("boxes", summary.boxes),
        ("of them crowds", summary.crowds),
        *((f"{name} boxes", summary.areas[name]) for name in ("small", "medium", "large")),
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


def _table(categories: list[dict[str, Any]]) -> str:
    rows = [
        {**row, "name": printable(row["name"], longest=_LONGEST_NAME).replace("|", "\\|")}
        for row in categories
    ]
    # Else a class "007" or "1e5" would be a number.
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=[1])


def _print_problems(title: str, problems: Issues) -> None:
    if not problems:
        print(f"No {title}.\n")
        return
    rows = [
        (count, kind, "\n".join(problems.examples[kind][:3]) + "\n..." * (count > 3))
        for kind, count in problems.counts.items()
    ]
    headers = ["count", title, "such as"]
    print(tabulate(rows, headers=headers, tablefmt="grid", maxcolwidths=[None, 36, 80]), end="\n\n")


def _plain(problems: Issues) -> dict[str, Any]:
    return {
        kind: {"count": count, "examples": problems.examples[kind]}
        for kind, count in problems.counts.items()
    }


if __name__ == "__main__":
    sys.exit(main())

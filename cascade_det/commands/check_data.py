"""Check data sets without training; the exit status is 1 if one has errors.

cascade-det check-data --json train.json --images folder/
cascade-det check-data --json data.yaml --images images/train (or a folder of label files)
cascade-det check-data --config-file ... [--decode] [KEY VALUE ...]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cascade_det.commands.arguments import (
    add_config_file,
    add_config_options,
    check_output_file,
    command_parser,
)
from cascade_det.commands.errors import without_traceback
from cascade_det.data.image_names import LINK_RULES, LinkRule
from cascade_det.errors import CascadeDetError, ConfigError, DatasetError

if TYPE_CHECKING:
    from cascade_det.commands.dataset_report import DatasetUse
    from cascade_det.commands.semantic_report import SemanticUse

FOLLOW_LINKS = "--follow-links"


def _parse(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    parser = command_parser(prog, __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--json",
        metavar="FILE",
        help="annotations: a COCO json, YOLO's data.yaml, or a folder or list of label files",
    )
    add_config_file(source, required=False, text="check DATASETS.TRAIN and TEST; ")
    parser.add_argument("--images", metavar="FOLDER", help="of --json; near it by default")
    parser.add_argument(
        "--decode",
        action="store_true",
        help="decode every image, not only those of DATASETS.TEST: slow, finds all damage",
    )
    parser.add_argument(
        FOLLOW_LINKS,
        choices=LINK_RULES,
        default=LINK_RULES[0],
        help="with --json: which links out of the image folder to follow, as CASCADE.FOLLOW_LINKS "
        "does in a configuration",
    )
    parser.add_argument(
        "--masks",
        action="store_true",
        help="with --json: check the masks too, as MODEL.MASK_ON does in a configuration",
    )
    parser.add_argument("--json-out", metavar="FILE", help="write the findings as json")
    add_config_options(parser)
    args = parser.parse_args(argv)
    if args.json and args.opts:
        parser.error(f"unexpected with --json: {' '.join(args.opts)}")
    return args


@without_traceback
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command; its exit status is 1 if training or testing would fail."""
    args = _parse(argv, prog)
    from cascade_det.commands.dataset_report import DatasetUse, report_dataset
    from cascade_det.commands.semantic_report import report_semantic
    from cascade_det.engine.log import setup_logging
    from cascade_det.files import write_json

    setup_logging()
    uses = _uses(args)
    if args.json_out:
        files = [use.source.json_file for use in uses if isinstance(use, DatasetUse)]
        check_output_file(Path(args.json_out), [*files, *(args.config_file or ())])
        _check_replaceable(Path(args.json_out))
    reports = {
        # A test run decodes all its images first.
        use.source.name: (
            report_dataset(use, decode=args.decode or use.for_testing)
            if isinstance(use, DatasetUse)
            else report_semantic(use, decode=args.decode or use.for_testing)
        )
        for use in uses
    }
    if args.json_out:
        write_json(reports, args.json_out, indent=2)
    return int(any(report["problems"] for report in reports.values()))


def _check_replaceable(json_out: Path) -> None:
    """Refuse to replace a file without findings: an image, say, given by mistake."""
    from cascade_det.data.annotation_file import read_json

    if not json_out.exists():
        return
    try:
        content = read_json(json_out)
    except DatasetError:
        content = None
    reports = content.values() if isinstance(content, dict) else [content]
    if not all(isinstance(report, dict) and "problems" in report for report in reports):
        raise CascadeDetError(
            f"{json_out}: exists, and holds no findings of this command. Give another name, or "
            "move it away."
        )


def _uses(args: argparse.Namespace) -> list[DatasetUse | SemanticUse]:
    from cascade_det.commands.dataset_report import DatasetUse
    from cascade_det.commands.semantic_report import SemanticUse
    from cascade_det.config import (
        check_config,
        datasets_arguments,
        load_config,
        semantic_datasets_arguments,
    )
    from cascade_det.data.catalog import dataset_of_files, find_dataset
    from cascade_det.data.semantic import find_semantic_dataset

    if args.json:
        links = LinkRule(args.follow_links, FOLLOW_LINKS)
        return [DatasetUse(dataset_of_files(args.json, args.images), links, masks=args.masks)]
    cfg = load_config(args.config_file, args.opts)
    check_config(cfg)
    uses: dict[str, DatasetUse | SemanticUse] = {}
    for train in (True, False):
        arguments = datasets_arguments(cfg, train)
        semantic = semantic_datasets_arguments(cfg, train)
        for name in arguments["names"]:
            links = LinkRule(arguments["follow_links"])
            use: DatasetUse | SemanticUse
            if name in {own[0] for own in semantic["own_datasets"]}:
                labelled = find_semantic_dataset(
                    name,
                    semantic["own_datasets"],
                    class_names=semantic["class_names"],
                    ignore_value=semantic["ignore_value"],
                )
                use = SemanticUse(labelled, links, num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
            else:
                source = find_dataset(name, arguments["own_datasets"])
                classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
                masks = arguments["masks"] is not None
                use = DatasetUse(source, links, num_classes=classes, masks=masks)
            use = uses.setdefault(name, use)
            use.for_training |= train
            use.for_testing |= not train
    if not uses:
        raise ConfigError("DATASETS.TRAIN and DATASETS.TEST are empty: there is nothing to check")
    return list(uses.values())

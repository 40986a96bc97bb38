"""Make the HTML report of an evaluation or a calibration again, or compare two evaluations.

cascade-det report output/cells
cascade-det report output/exits --output exits.html
cascade-det report --compare output/a output/b --output comparison.html

The first two read what a run left in its folder, and need no model. --compare needs the same images
in both, and gives bootstrap intervals of the differences of AP.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade_det.commands.arguments import check_output_file, command_parser
from cascade_det.commands.errors import without_traceback
from cascade_det.errors import CascadeDetError, DatasetError

if TYPE_CHECKING:
    from cascade_det.report.pages.detections import ReadImage

logger = logging.getLogger(__name__)

_CALIBRATION = "calibration.json"


def _parse(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    parser = command_parser(prog, __doc__)
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="of the run")
    parser.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="the folders of two evaluations"
    )
    parser.add_argument(
        "--output", metavar="HTML", help="the file to write (report.html in FOLDER)"
    )
    parser.add_argument(
        "--json", metavar="JSON", help="the annotations, if they are not where the run had them"
    )
    parser.add_argument("--images", metavar="FOLDER", help="the same of the images")
    args = parser.parse_args(argv)
    if (args.folder is None) == (args.compare is None):
        parser.error("give either FOLDER or --compare A B")
    if args.compare and not args.output:
        parser.error("--compare needs --output: a file that belongs to neither run")
    if args.images and not args.json and args.compare:
        parser.error("--images needs --json")
    return args


@without_traceback
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parse(argv, prog)
    from cascade_det.engine.log import setup_logging

    setup_logging()
    path = _compare(args) if args.compare else _report(args)
    logger.info("Written: %s", path)
    return 0


def _report(args: argparse.Namespace) -> Path:
    from cascade_det.calibration.page import write_calibration_page
    from cascade_det.commands.evaluated_runs import EvaluatedRun
    from cascade_det.report.pages.evaluation import write_evaluation_page
    from cascade_det.report.pages.page import REPORT_FILE

    folder = Path(args.folder)
    path = Path(args.output) if args.output else folder / REPORT_FILE
    if (folder / _CALIBRATION).is_file():
        _check_output(path, [folder])
        if args.json or args.images:
            raise CascadeDetError("--json and --images are for evaluations: leave them out")
        return write_calibration_page(folder, path)
    run = EvaluatedRun.of(folder, args.json, args.images)
    _check_output(path, [folder, run.json_file])
    results = run.results
    analysis = results.get("analysis")
    if isinstance(analysis, dict) and "curves" not in analysis and run.source is not None:
        # Of an earlier version.
        results = {**results, "analysis": run.scored_again()["analysis"]}
    return write_evaluation_page(
        folder, results=results, read_image=_reader(run.image_root), path=path
    )


def _reader(image_root: Path | None) -> ReadImage | None:
    from cascade_det.data.catalog import DatasetSource
    from cascade_det.data.image_names import ALL_LINKS, name_guard
    from cascade_det.engine.evaluate import image_reader

    if image_root is None:
        return None
    read = image_reader(image_root)
    # The names are of a file that may come from elsewhere, and the page may be passed on.
    leaves = name_guard(DatasetSource("", image_root / "any.json", image_root), ALL_LINKS)

    def read_inside(file_name: str) -> Any:
        if leaves(file_name) is not None:
            raise DatasetError(f"leaves the image folder {image_root}")
        return read(file_name)

    return read_inside


def _compare(args: argparse.Namespace) -> Path:
    from cascade_det.calibration.run_comparison_page import write_comparison_page
    from cascade_det.commands.evaluated_runs import EvaluatedRun, compare_runs

    path = Path(args.output)
    folders = [Path(folder) for folder in args.compare]
    runs = [EvaluatedRun.of(folder, args.json, args.images) for folder in folders]
    _check_output(path, [*folders, *(run.json_file for run in runs)])
    compared = compare_runs(*runs)
    write_comparison_page(path, args.compare, [run.results for run in runs], compared)
    return path


def _check_output(path: Path, inputs: Sequence[Any]) -> None:
    """Raise CascadeDetError if the page would replace what it is made from."""
    from cascade_det.evaluation.coco import RESULTS_FILE as PREDICTIONS

    names = ("results.json", "scores.json", _CALIBRATION, "metrics.json", PREDICTIONS)
    files: list[Any] = []
    for given in filter(None, inputs):
        of_folder = [Path(given, name) for name in names] if Path(given).is_dir() else []
        files += of_folder or [given]
    check_output_file(path, files)

"""Score a file of predictions: the tables of an evaluation without running a detector.

cascade-det eval-json --json val.json --predictions output/inference/coco_instances_results.json
cascade-det eval-json --json val.json --predictions ... --images folder/ --output scored/
cascade-det eval-json --json val.json --predictions pictures/predictions.json

The last one comes from cascade-det predict; file names tell which images are meant. So they do for
the folder of predict --engine.

Predictions with a segmentation (RLE) are scored by their masks as well.

AP is over all images of the json, except those that --on-bad-data skips. --output gets scores.json,
report.html and the tables and pictures of analysis/; with --images, the images with the most errors
are drawn.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade_det.commands.arguments import check_output_file, command_parser, real, whole
from cascade_det.commands.errors import without_traceback
from cascade_det.data.image_names import LINK_RULES, LinkRule
from cascade_det.errors import CascadeDetError

if TYPE_CHECKING:
    from cascade_det.data.coco import CocoDataset

BAD_DATA_OPTION = "--on-bad-data"
LIMIT_OPTION = "--max-detections"
LINKS_OPTION = "--follow-links"
MASKS_OPTION = "--by-masks"
SCORES_FILE = "scores.json"

logger = logging.getLogger(__name__)


def _parse(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    parser = command_parser(prog, __doc__)
    parser.add_argument(
        "--predictions",
        required=True,
        metavar="JSON",
        help="in COCO's result format, predictions.json of predict, or the folder or a part of "
        "predict --engine",
    )
    parser.add_argument("--json", required=True, metavar="JSON", help="the annotations")
    parser.add_argument("--images", metavar="FOLDER", help="of the annotations; checks them")
    parser.add_argument("--output", metavar="FOLDER", help="for metrics, tables and pictures")
    parser.add_argument(
        "--score-threshold",
        type=real(0, 1),
        default=0.5,
        help="of the detections that count for all metrics but AP (0.5)",
    )
    parser.add_argument(
        MASKS_OPTION,
        action="store_true",
        help="match objects by their masks for all metrics but AP (by their boxes)",
    )
    parser.add_argument(
        LIMIT_OPTION,
        type=whole(1),
        default=100,
        metavar="N",
        help="that count per class and image, best first (100, COCO's limit); a run counts "
        "TEST.DETECTIONS_PER_IMAGE, if that is more",
    )
    parser.add_argument(
        BAD_DATA_OPTION,
        choices=("error", "skip"),
        default="error",
        help="what to do about bad annotations and images, as CASCADE.ON_BAD_DATA; images are "
        "checked with --images only, so without it AP differs from a run that skipped some",
    )
    parser.add_argument(
        LINKS_OPTION,
        choices=LINK_RULES,
        default=LINK_RULES[0],
        help="which links out of the folder of --images to follow, as CASCADE.FOLLOW_LINKS",
    )
    return parser.parse_args(argv)


@without_traceback
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parse(argv, prog)
    from cascade_det.commands.prediction_scores import evaluate, have_masks
    from cascade_det.data.catalog import dataset_of_files
    from cascade_det.data.coco import load_dataset
    from cascade_det.engine.log import setup_logging
    from cascade_det.report.text import format_report

    setup_logging()
    if args.output:
        check_output_file(Path(args.output, SCORES_FILE), [args.json, args.predictions])
        _check_analysis(Path(args.output), [args.json, args.predictions, args.images])
    content = _read_predictions(args.predictions)
    dataset = load_dataset(
        dataset_of_files(args.json, args.images),
        args.on_bad_data,
        masks="keep" if have_masks(content) else None,
        keep_ground_truth=True,
        check_images=args.images is not None,
        decode=True,  # as before a run, so that the same images are skipped
        option=BAD_DATA_OPTION,
        links=LinkRule(args.follow_links, LINKS_OPTION),
    )
    results = evaluate(
        dataset,
        Path(args.predictions),
        content,
        args.score_threshold,
        by_masks=args.by_masks,
        max_detections=args.max_detections,
    )
    print(format_report(results))
    if args.output:
        results["predictions"] = args.predictions
        _write(results, dataset, Path(args.output), with_pictures=args.images is not None)
    return 0


def _read_predictions(source: str) -> Any:
    from cascade_det.data.annotation_file import read_json
    from cascade_det.offline.results import is_parquet_source, read_predictions

    return read_predictions(source) if is_parquet_source(source) else read_json(Path(source))


def _check_analysis(output: Path, inputs: Sequence[str | None]) -> None:
    """Raise CascadeDetError if an input lies in the analysis folder, which is replaced."""
    from cascade_det.report.analysis_files import FOLDER

    folder = os.path.realpath(output / FOLDER)
    for given in filter(None, inputs):
        if os.path.commonpath((folder, os.path.realpath(given))) == folder:
            raise CascadeDetError(
                f"--output {output}: its {FOLDER} would replace {given}. Give another folder."
            )


def _write(
    results: dict[str, Any], dataset: CocoDataset, folder: Path, *, with_pictures: bool
) -> None:
    from cascade_det.engine.evaluate import describe_data, image_reader
    from cascade_det.files import write_json
    from cascade_det.report.analysis_files import as_extra, write_analysis
    from cascade_det.report.pages.evaluation import read_results, write_evaluation_page
    from cascade_det.report.pages.page import REPORT_FILE

    write_json({**results, "data": describe_data(dataset)}, folder / SCORES_FILE, indent=2)
    read = image_reader(dataset.source.image_root) if with_pictures else None
    analysis = write_analysis(results["analysis"], folder, read_image=read)
    with as_extra(folder / REPORT_FILE):
        saved = read_results(folder / SCORES_FILE)
        write_evaluation_page(folder, results=saved, read_image=read)
    logger.info("Written: %s, %s and %s", folder / SCORES_FILE, REPORT_FILE, analysis)

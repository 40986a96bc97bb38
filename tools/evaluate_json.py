#!/usr/bin/env python3
"""Score a file of predictions: the tables of an evaluation without running a detector.

python tools/evaluate_json.py --json val.json \
    --predictions output/inference/coco_instances_results.json
python tools/evaluate_json.py --json val.json --predictions ... --images folder/ --output scored/
python tools/evaluate_json.py --json val.json --predictions pictures/predictions.json

The last one is what tools/predict.py wrote; its images are found in the json by their file names.

AP is computed over all images of the json, but for those that --on-bad-data skips. --output gets
scores.json and the tables and pictures of analysis/; the images with the most mistakes are drawn
where --images is given too.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from cascade_det.commands.arguments import check_output_file, real, whole
from cascade_det.data.image_names import LINK_RULES, LinkRule

_BAD_DATA_OPTION = "--on-bad-data"
_LIMIT_OPTION = "--max-detections"
_LINKS_OPTION = "--follow-links"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score a file of predictions.")
    parser.add_argument(
        "--predictions", required=True, metavar="JSON", help="COCO result format, or of predict.py"
    )
    parser.add_argument("--json", required=True, metavar="JSON", help="the annotations")
    parser.add_argument("--images", metavar="FOLDER", help="of the annotations; they are checked")
    parser.add_argument("--output", metavar="FOLDER", help="for figures, tables and pictures")
    parser.add_argument(
        "--score-threshold", type=real(0, 1), default=0.5, help="of what counts beside AP (0.5)"
    )
    parser.add_argument(
        _LIMIT_OPTION,
        type=whole(1),
        default=100,
        metavar="N",
        help="of a class in an image that count, best first (100, COCO's limit); a run counts as "
        "many as TEST.DETECTIONS_PER_IMAGE, where that is more",
    )
    parser.add_argument(
        _BAD_DATA_OPTION,
        choices=("error", "skip"),
        default="error",
        help="what to do about bad annotations and images, as CASCADE.ON_BAD_DATA does; without "
        "--images the files are not looked at, so AP differs from that of a run that skipped some",
    )
    parser.add_argument(
        _LINKS_OPTION,
        choices=LINK_RULES,
        default=LINK_RULES[0],
        help="which links out of the folder of --images are followed, as CASCADE.FOLLOW_LINKS says",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    _parse(None)  # Help and errors do not wait for the imports below.

from cascade_det.commands.errors import without_traceback
from cascade_det.data.annotation_file import read_json
from cascade_det.data.catalog import dataset_of_files
from cascade_det.data.coco import CocoDataset, left_out_warnings, load_dataset
from cascade_det.data.issues import Issues, shown
from cascade_det.data.predicted import is_of_predict, predicted_annotations
from cascade_det.data.transforms import read_image
from cascade_det.engine.log import setup_logging
from cascade_det.errors import CascadeDetError, DatasetError
from cascade_det.evaluation import score_results
from cascade_det.evaluation.ap_warnings import too_many_objects_warning
from cascade_det.evaluation.average_precision import MAX_DETECTIONS
from cascade_det.evaluation.ground_truth import load_ground_truth
from cascade_det.files import write_json
from cascade_det.report.analysis_files import FOLDER, write_analysis
from cascade_det.report.text import format_report

SCORES_FILE = "scores.json"
# Beyond any image or score, and far from where floats end.
_LIMIT = 1e9

logger = logging.getLogger(__name__)


@without_traceback
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parse(argv)
    setup_logging()
    if args.output:
        check_output_file(Path(args.output, SCORES_FILE), [args.json, args.predictions])
        _check_analysis(Path(args.output), [args.json, args.predictions, args.images])
    dataset = load_dataset(
        dataset_of_files(args.json, args.images),
        args.on_bad_data,
        keep_ground_truth=True,
        check_images=args.images is not None,
        decode=True,  # as before a run, so that the same images are left out
        option=_BAD_DATA_OPTION,
        links=LinkRule(args.follow_links, _LINKS_OPTION),
    )
    results = evaluate(
        dataset, Path(args.predictions), args.score_threshold, max_detections=args.max_detections
    )
    print(format_report(results))
    if args.output:
        _write(results, dataset, Path(args.output), with_pictures=args.images is not None)
    return 0


def _check_analysis(output: Path, inputs: Sequence[str | None]) -> None:
    """Make sure that nothing that is read lies where an older analysis is replaced."""
    folder = os.path.realpath(output / FOLDER)
    for given in filter(None, inputs):
        if os.path.commonpath((folder, os.path.realpath(given))) == folder:
            raise CascadeDetError(
                f"--output {output}: its {FOLDER} would replace {given}. Give another folder."
            )


def evaluate(
    dataset: CocoDataset,
    predictions_file: Path,
    score_threshold: float = 0.5,
    *,
    max_detections: int = MAX_DETECTIONS,
) -> dict[str, Any]:
    """The figures of a file of predictions, see ``score_results``.

    Predictions on images that the data set leaves out are left out too; ``notes`` say how many.

    Raises:
        DatasetError: the predictions cannot be used, or there are no annotations to hold them
            against.
    """
    coco_gt = load_ground_truth(dataset.ground_truth)
    if "annotations" not in dataset.ground_truth:
        raise DatasetError(f"{dataset.source.json_file}: has no annotations to score against")
    predictions, notes = read_predictions(predictions_file, dataset)
    kept = [entry for entry in predictions if entry["image_id"] in coco_gt.imgs]
    image_ids = sorted(coco_gt.imgs)
    results = score_results(
        *(coco_gt, kept, image_ids), score_threshold=score_threshold, max_detections=max_detections
    )
    notes += [
        *too_many_objects_warning(coco_gt, image_ids, max_detections, _LIMIT_OPTION, of_class=True),
        *results["notes"],
        *left_out_warnings(dataset, _BAD_DATA_OPTION),
    ]
    if dropped := len(predictions) - len(kept):
        notes.append(f"{dropped} of {len(predictions)} predictions are on images left out.")
    return {**results, "notes": notes}


def read_predictions(path: Path, dataset: CocoDataset) -> tuple[list[dict[str, Any]], list[str]]:
    """Read predictions, and check each of them.

    Args:
        path: json: a list of objects with ``image_id``, ``category_id``, ``bbox`` (XYWH in pixels)
            and ``score``; what else they hold is left alone. Or ``predictions.json`` of
            ``tools/predict.py``, see ``predicted_annotations``.
        dataset: its images and categories, those left out too, are what may occur.

    Returns:
        The list, with image ids of the data set, and what to say of it.

    Raises:
        DatasetError: the file cannot be read, or anything in it is wrong; all kinds of problem are
            listed with counts and examples.
    """
    truth = dataset.ground_truth
    image_ids = {image["id"] for image in truth["images"]} | dataset.left_out_images
    category_ids = {category["id"] for category in truth["categories"]}
    predictions, notes = read_json(path), []
    if is_of_predict(predictions):
        try:
            predictions, notes = predicted_annotations(predictions, dataset)
        except DatasetError as error:
            raise DatasetError(f"{path}: {error}") from None
    if not isinstance(predictions, list):
        raise DatasetError(
            f"{path}: is no list of predictions: its top level is {type(predictions).__name__}. "
            "Give a file like inference/coco_instances_results.json, or predictions.json of "
            "tools/predict.py."
        )
    problems = Issues()
    for number, prediction in enumerate(predictions, start=1):
        for problem, value in _problems_of(prediction, image_ids, category_ids):
            problems.add(problem, _describe, number, value)
    if problems:
        raise DatasetError(
            f"{path}: bad predictions, of {len(predictions)}\n{problems}\n"
            "Predictions belong to one annotation file: are these of the given --json?"
        )
    return predictions, notes


def _problems_of(
    prediction: Any, image_ids: Collection[int], category_ids: Collection[int]
) -> list[tuple[str, Any]]:
    if not isinstance(prediction, dict):
        return [("prediction that is no object", prediction)]
    image_id, category_id = prediction.get("image_id"), prediction.get("category_id")
    box, score = prediction.get("bbox"), prediction.get("score")
    found = []
    if type(image_id) is not int or image_id not in image_ids:
        found.append(("prediction with an unknown 'image_id'", image_id))
    if type(category_id) is not int or category_id not in category_ids:
        found.append(("prediction with an unknown 'category_id'", category_id))
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        found.append(("prediction whose 'bbox' is not four finite numbers", box))
    elif min(box[2:]) < 0:
        found.append(("prediction whose 'bbox' has a negative width or height", box))
    if not _is_number(score):
        found.append(("prediction whose 'score' is no finite number", score))
    return found


def _is_number(value: Any) -> bool:
    # NaN and the infinities fail the comparison.
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and -_LIMIT < value < _LIMIT
    )


def _describe(number: int, value: Any) -> str:
    return f"number {number} ({shown(value)})"


def _write(
    results: dict[str, Any], dataset: CocoDataset, folder: Path, *, with_pictures: bool
) -> None:
    def read(file_name: str) -> Any:
        return read_image(str(dataset.source.image_root / file_name), "BGR")

    write_json(results, folder / SCORES_FILE, indent=2)
    analysis = write_analysis(
        results["analysis"], folder, read_image=read if with_pictures else None
    )
    logger.info("Written: %s and %s", folder / SCORES_FILE, analysis)


if __name__ == "__main__":
    sys.exit(main())

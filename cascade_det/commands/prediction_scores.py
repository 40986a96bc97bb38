"""Metrics of a file of predictions, which is checked first."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from cascade_det.commands.eval_json import BAD_DATA_OPTION, LIMIT_OPTION, MASKS_OPTION
from cascade_det.data.coco import CocoDataset, left_out_warnings
from cascade_det.data.issues import Issues, shown
from cascade_det.data.predicted import is_of_predict, predicted_annotations
from cascade_det.errors import DatasetError
from cascade_det.evaluation import score_results
from cascade_det.evaluation.ap_warnings import too_many_objects_warning
from cascade_det.evaluation.average_precision import MAX_DETECTIONS
from cascade_det.evaluation.ground_truth import load_ground_truth, load_mask_truth
from cascade_det.masks.rle import compressed

# Beyond any image or score, and far below the largest float.
_LIMIT = 1e9


def have_masks(content: Any) -> bool:
    """Whether the content of a file of predictions has masks."""
    entries = content["annotations"] if is_of_predict(content) else content
    return isinstance(entries, list) and any(
        isinstance(entry, dict) and "segmentation" in entry for entry in entries
    )


def evaluate(
    dataset: CocoDataset,
    predictions_file: Path,
    content: Any,
    score_threshold: float = 0.5,
    *,
    by_masks: bool = False,
    max_detections: int = MAX_DETECTIONS,
) -> dict[str, Any]:
    """Score a file of predictions, as ``score_results`` does; of masks, if any has one.

    Predictions on images that the data set skips are skipped and counted in ``notes``.

    Args:
        dataset: with its ground truth; with its masks, if predictions have some.
        predictions_file: for messages.
        content: of that file.
        score_threshold: see ``score_results``.
        by_masks: see ``score_results``.
        max_detections: see ``score_results``.

    Raises:
        DatasetError: the predictions cannot be used, or the data set has no annotations.
    """
    coco_gt = load_ground_truth(dataset.ground_truth)
    if "annotations" not in dataset.ground_truth:
        raise DatasetError(f"{dataset.source.json_file}: has no annotations to score against")
    predictions, notes = check_predictions(predictions_file, content, dataset)
    kept = [entry for entry in predictions if entry["image_id"] in coco_gt.imgs]
    image_ids = sorted(coco_gt.imgs)
    has_masks = have_masks(content)
    if by_masks and not has_masks:
        raise DatasetError(f"{predictions_file}: has no masks for {MASKS_OPTION}")
    results = score_results(
        coco_gt,
        kept,
        image_ids,
        mask_truth=load_mask_truth(dataset.ground_truth) if has_masks else None,
        by_masks=by_masks,
        score_threshold=score_threshold,
        max_detections=max_detections,
    )
    notes += [
        *too_many_objects_warning(coco_gt, image_ids, max_detections, LIMIT_OPTION, of_class=True),
        *results["notes"],
        *left_out_warnings(dataset, BAD_DATA_OPTION),
    ]
    if dropped := len(predictions) - len(kept):
        notes.append(f"{dropped} of {len(predictions)} predictions are on images left out.")
    return {**results, "notes": notes}


def check_predictions(
    path: Path, content: Any, dataset: CocoDataset
) -> tuple[list[dict[str, Any]], list[str]]:
    """Check each prediction.

    Args:
        path: of the file, for messages.
        content: a json list of objects with ``image_id``, ``category_id``, ``bbox`` (XYWH in
            pixels) and ``score``, and ``segmentation`` (RLE) for a mask; other keys are ignored.
            Or the ``predictions.json`` of ``predict``, see ``predicted_annotations``.
        dataset: its images, skipped ones included, and categories are the valid ones.

    Returns:
        The predictions, with the data set's image ids, and notes for the report.

    Raises:
        DatasetError: there are errors; each kind is listed with its count and examples.
    """
    truth = dataset.ground_truth
    sizes: dict[int, tuple[int, int] | None] = dict.fromkeys(dataset.left_out_images)
    sizes |= {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    category_ids = {category["id"] for category in truth["categories"]}
    predictions = content
    notes: list[str] = []
    if is_of_predict(predictions):
        try:
            predictions, notes = predicted_annotations(predictions, dataset)
        except DatasetError as error:
            raise DatasetError(f"{path}: {error}") from None
    if not isinstance(predictions, list):
        raise DatasetError(
            f"{path}: is not a list of predictions: its top level is {type(predictions).__name__}. "
            "Give a file like inference/coco_instances_results.json, or predictions.json of "
            "cascade-det predict."
        )
    problems = Issues()
    for number, prediction in enumerate(predictions, start=1):
        for problem, value in _problems_of(prediction, sizes, category_ids):
            problems.add(problem, _describe, number, value)
    if problems:
        raise DatasetError(
            f"{path}: bad predictions, of {len(predictions)}\n{problems}\n"
            "Predictions belong to one annotation file: are these of the given --json?"
        )
    return predictions, notes


def _problems_of(
    prediction: Any,
    sizes: Mapping[int, tuple[int, int] | None],
    category_ids: Collection[int],
) -> list[tuple[str, Any]]:
    if not isinstance(prediction, dict):
        return [("prediction that is not an object", prediction)]
    image_id, category_id = prediction.get("image_id"), prediction.get("category_id")
    box, score = prediction.get("bbox"), prediction.get("score")
    found = []
    if type(image_id) is not int or image_id not in sizes:
        found.append(("prediction with an unknown 'image_id'", image_id))
    elif "segmentation" in prediction and (size := sizes[image_id]) is not None:
        try:
            prediction["segmentation"] = compressed(prediction["segmentation"], *size)
        except ValueError as error:
            kind = f"prediction whose 'segmentation' {error}"
            found.append((kind, prediction["segmentation"]))
    if type(category_id) is not int or category_id not in category_ids:
        found.append(("prediction with an unknown 'category_id'", category_id))
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        found.append(("prediction whose 'bbox' is not four finite numbers", box))
    elif min(box[2:]) < 0:
        found.append(("prediction whose 'bbox' has a negative width or height", box))
    if not _is_number(score):
        found.append(("prediction whose 'score' is not a finite number", score))
    return found


def _is_number(value: Any) -> bool:
    # NaN and infinities fail the comparison.
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and -_LIMIT < value < _LIMIT
    )


def _describe(number: int, value: Any) -> str:
    return f"number {number} ({shown(value)})"

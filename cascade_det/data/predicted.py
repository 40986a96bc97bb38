"""Reads ``predictions.json`` of the predict command, with the ids of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from cascade_det.data.coco import CocoDataset
from cascade_det.data.issues import Issues, shown
from cascade_det.errors import DatasetError

_LISTS = ("images", "annotations", "categories")
_RESULT_KEYS = ("category_id", "bbox", "score", "segmentation", "exit_stage")
# In place of the id of an image that is left out of the data set.
_LEFT_OUT = object()


def is_of_predict(content: Any) -> bool:
    """Whether a json is such a file: COCO's lists, and ``failed``."""
    return isinstance(content, dict) and all(
        isinstance(content.get(key), list) for key in (*_LISTS, "failed")
    )


def predicted_annotations(
    content: Mapping[str, Any], dataset: CocoDataset
) -> tuple[list[Any], list[str]]:
    """The predictions in COCO's result format, with the image ids of a data set.

    Images are matched by name: ``photos/day/1.jpg`` is the image ``day/1.jpg`` of the data set, or
    else ``1.jpg``. Predictions on images that the data set leaves out are dropped.

    Args:
        content: see :func:`is_of_predict`.
        dataset: with its ground truth.

    Returns:
        The predictions, unchecked, and warnings about images without any.

    Raises:
        DatasetError: images or classes are not those of the data set; all issues are listed.
    """
    issues = Issues()
    _check_categories(content["categories"], dataset, issues)
    ids = _image_ids(content["images"], dataset, issues)
    found: list[Any] = []
    for entry in content["annotations"]:
        image_id = ids.get(_hashable(entry.get("image_id"))) if isinstance(entry, dict) else None
        if image_id is None:
            issues.add("prediction on an image that is not listed", shown, entry)
        elif image_id is not _LEFT_OUT:
            kept = {key: entry[key] for key in _RESULT_KEYS if key in entry}
            found.append({"image_id": image_id, **kept})
    if issues:
        raise DatasetError(
            f"does not fit the annotations\n{issues}\nDoes it belong to the images of this --json?"
        )
    return found, _warnings(content, dataset, ids)


def _warnings(
    content: Mapping[str, Any], dataset: CocoDataset, ids: Mapping[Any, Any]
) -> list[str]:
    warnings = []
    if failed := len(content["failed"]):
        warnings.append(f"{failed} images failed in prediction: see 'failed' there.")
    seen = set(ids.values())
    missing = [i["file_name"] for i in dataset.ground_truth["images"] if i["id"] not in seen]
    if missing:
        warnings.append(
            f"{len(missing)} images of the json are not in the predictions (such as "
            f"{shown(missing[0])}): their objects count as missed."
        )
    return warnings


def _check_categories(categories: Sequence[Any], dataset: CocoDataset, issues: Issues) -> None:
    names = dict(zip(dataset.category_ids, dataset.class_names, strict=True))
    for entry in categories:
        number = _hashable(entry.get("id")) if isinstance(entry, dict) else None
        # An unknown category is reported with its predictions.
        if number in names and entry.get("name") != names[number]:
            detail = f"{number}: {shown(entry.get('name'))}, not {shown(names[number])}"
            issues.add("category of another name", str, detail)


def _image_ids(images: Sequence[Any], dataset: CocoDataset, issues: Issues) -> dict[Any, Any]:
    """The id in the data set, or ``_LEFT_OUT``, by image id of the prediction."""
    known = {
        PurePosixPath(image["file_name"]).parts: image for image in dataset.ground_truth["images"]
    }
    left_out = len(dataset.left_out_images)
    ids: dict[Any, Any] = {}
    taken: set[int] = set()
    for entry in images:
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            issues.add("image without a file name", shown, entry)
            continue
        number, name = _hashable(entry.get("id")), entry["file_name"]
        if number is None:
            issues.add("image without a usable id", shown, name)
            continue
        parts = PurePosixPath(name).parts
        image = next((known[parts[i:]] for i in range(len(parts)) if parts[i:] in known), None)
        if image is None and left_out:
            left_out -= 1
            ids[number] = _LEFT_OUT
        elif image is None:
            issues.add("image that the annotations do not have", shown, name)
        elif image["id"] in taken or number in ids:
            issues.add("image listed twice", shown, name)
        elif (entry.get("height"), entry.get("width")) != (image["height"], image["width"]):
            issues.add("image of another size", shown, name)
        else:
            ids[number] = image["id"]
            taken.add(image["id"])
    return ids


def _hashable(value: Any) -> Any:
    return value if isinstance(value, int | str) else None

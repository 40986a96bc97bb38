"""The annotations that detections are held against."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence

from pycocotools.coco import COCO

from cascade_det.errors import DatasetError
from cascade_det.evaluation.evaluator import Sample

logger = logging.getLogger(__name__)


def load_ground_truth(json_file: str | os.PathLike[str]) -> COCO:
    """Read a COCO-format json so that pycocotools evaluates it correctly.

    Annotations get ids 1, 2, ...: pycocotools marks a match with the id of the annotation, so
    an object with id 0 could never be found, and of two equal ids one would be lost. Missing
    ``iscrowd`` and ``area`` become 0 and the area of the box.

    Raises:
        DatasetError: the file cannot be read or is not COCO format.
    """
    dataset = _read_json(json_file)
    for number, annotation in enumerate(dataset.get("annotations", []), start=1):
        try:
            _, _, width, height = annotation["bbox"]
            annotation["image_id"], annotation["category_id"]
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(
                f"{json_file}: annotation {number} needs image_id, category_id and "
                f"bbox = [x, y, width, height]: {error!r}"
            ) from error
        annotation["id"] = number
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", width * height)
    coco = COCO()
    coco.dataset = dataset
    with stdout_to_log():
        coco.createIndex()
    return coco


def admit_images(
    batch: Sequence[Sample],
    detections_per_image: Sequence[object],
    coco_gt: COCO,
    seen: set[int],
) -> None:
    """Add the images of a batch to ``seen``.

    Raises:
        DatasetError: an image is not in the json, or was processed before.
        ValueError: there are not as many outputs as images.
    """
    if len(batch) != len(detections_per_image):
        raise ValueError(f"{len(batch)} images but {len(detections_per_image)} detector outputs")
    for sample in batch:
        image_id = sample["image_id"]
        if image_id not in coco_gt.imgs:
            raise DatasetError(
                f"image {image_id} ({sample.get('file_name', 'no file name')}) is not in the "
                "annotation file that it is evaluated with: give the evaluator the json that "
                "the images were loaded from"
            )
        if image_id in seen:
            raise DatasetError(
                f"image {image_id} ({sample.get('file_name', 'no file name')}) was processed "
                "twice: use a loader that visits every image once, and reset() between runs"
            )
        seen.add(image_id)


@contextlib.contextmanager
def stdout_to_log() -> Iterator[None]:
    """Send what pycocotools prints to the log, at level DEBUG."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        yield
    for line in printed.getvalue().splitlines():
        logger.debug(line)


def _read_json(json_file: str | os.PathLike[str]) -> dict:
    try:
        with open(json_file, encoding="utf-8") as file:
            dataset = json.load(file)
    except (OSError, ValueError) as error:
        raise DatasetError(f"cannot read the annotation file {json_file}: {error}") from error
    if not isinstance(dataset, dict) or not {"images", "categories"} <= dataset.keys():
        raise DatasetError(
            f"{json_file}: not COCO format: it needs the lists 'images' and 'categories' "
            "(and 'annotations' for an evaluation)"
        )
    return dataset

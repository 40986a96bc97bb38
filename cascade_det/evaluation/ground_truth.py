"""The ground truth of an evaluation, and the images that were processed."""

from __future__ import annotations

import contextlib
import io
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from cascade_det.data.samples import Sample
from cascade_det.errors import DatasetError

logger = logging.getLogger(__name__)


def load_ground_truth(content: Mapping[str, Any]) -> COCO:
    """Index the content of a COCO-format json so that pycocotools evaluates it correctly.

    Annotations get ids 1, 2, ...: pycocotools marks a match with the id of the annotation, so
    an object with id 0 could never be found, and of two equal ids one would be lost. Missing
    ``iscrowd`` and ``area`` become 0 and the area of the box.

    Args:
        content: ``images``, ``categories`` and, where there are any, ``annotations``, boxes in
            pixels of the original images; not changed.

    Raises:
        DatasetError: it is not COCO format.
    """
    if not {"images", "categories"} <= content.keys():
        raise DatasetError(
            "the ground truth is not COCO format: it needs the lists 'images' and 'categories' "
            "(and 'annotations' for an evaluation)"
        )
    coco = COCO()
    coco.dataset = dict(content)
    if "annotations" in content:
        coco.dataset["annotations"] = [
            _completed(annotation, number)
            for number, annotation in enumerate(content["annotations"], start=1)
        ]
    with stdout_to_log():
        coco.createIndex()
    return coco


def load_mask_truth(content: Mapping[str, Any]) -> COCO:
    """``load_ground_truth`` for an evaluation of masks: every annotation has compressed RLE.

    An object without a ``segmentation`` cannot be scored by its mask. It becomes a crowd region,
    all pixels of its box: detections there are neither found objects nor false positives.
    A missing ``area`` becomes that of the mask.

    Args:
        content: as for ``load_ground_truth``, with ``segmentation`` as pycocotools takes it:
            polygons or RLE.

    Raises:
        DatasetError: it is not COCO format.
    """
    coco = load_ground_truth(content)
    originals = content.get("annotations", [])
    for annotation, original in zip(coco.dataset.get("annotations", []), originals, strict=True):
        if annotation.get("segmentation"):
            rle = coco.annToRLE(annotation)
        else:
            image = coco.imgs[annotation["image_id"]]
            box = np.array([annotation["bbox"]], np.float64)
            (rle,) = coco_mask.frPyObjects(box, image["height"], image["width"])
            annotation["iscrowd"] = 1
        if isinstance(rle["counts"], bytes):
            rle = {**rle, "counts": rle["counts"].decode("ascii")}
        annotation["segmentation"] = rle
        if original.get("area") is None:
            annotation["area"] = float(coco_mask.area(rle))
    return coco


def class_labels(categories: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
    """A label for each category, by id: its name, with the id if several have the same name.

    Args:
        categories: of a COCO-format json, by id.

    Returns:
        Unique labels in the order of the ids, such as ``cell (id 3)`` and ``cell (id 7)``.
    """
    labels = {category_id: categories[category_id]["name"] for category_id in sorted(categories)}
    # Repeated, since a name may look like such a label.
    while len(counts := Counter(labels.values())) < len(labels):
        labels = {
            category_id: f"{label} (id {category_id})" if counts[label] > 1 else label
            for category_id, label in labels.items()
        }
    return labels


def by_image(items: Iterable[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    """Objects or detections by ``image_id``, in order; no entry for images without any."""
    groups = defaultdict(list)
    for item in items:
        groups[item["image_id"]].append(item)
    return groups


def admit_images(
    batch: Sequence[Sample],
    detections_per_image: Sequence[object],
    coco_gt: COCO,
    seen: set[int],
) -> None:
    """Add the images of a batch to ``seen``.

    Raises:
        DatasetError: an image is not in the json, or was processed before.
        ValueError: the numbers of outputs and images differ.
    """
    if len(batch) != len(detections_per_image):
        raise ValueError(f"{len(batch)} images but {len(detections_per_image)} detector outputs")
    for sample in batch:
        image_id = sample["image_id"]
        name = f"image {image_id} ({sample.get('file_name', 'no file name')})"
        if image_id not in coco_gt.imgs:
            raise DatasetError(
                f"{name} is not in the annotation file of the evaluation: give the evaluator the "
                "json that the images were loaded from"
            )
        if image_id in seen:
            raise DatasetError(
                f"{name} was processed twice: use a loader that visits every image once, and "
                "reset() between runs"
            )
        seen.add(image_id)


def merge_seen(seen_by_process: Iterable[Iterable[int]]) -> set[int]:
    """The images that were processed, over all processes.

    Raises:
        DatasetError: two processes had the same image, whose detections would count twice.
    """
    seen: set[int] = set()
    for image_ids in seen_by_process:
        if twice := seen.intersection(image_ids):
            raise DatasetError(
                f"{len(twice)} images, {min(twice)} among them, were processed by two processes: "
                "give each process images of its own"
            )
        seen.update(image_ids)
    return seen


@contextlib.contextmanager
def stdout_to_log() -> Iterator[None]:
    """Send the output of pycocotools to the log, at level DEBUG."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        yield
    for line in printed.getvalue().splitlines():
        logger.debug(line)


def _completed(annotation: Mapping[str, Any], number: int) -> dict[str, Any]:
    try:
        _, _, width, height = annotation["bbox"]
        annotation["image_id"], annotation["category_id"]
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            f"annotation {number} of the ground truth needs image_id, category_id and "
            f"bbox = [x, y, width, height]: {error!r}"
        ) from error
    return {"iscrowd": 0, "area": width * height, **annotation, "id": number}

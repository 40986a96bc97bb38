"""A COCO-format data set in memory, checked."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade_det.data.catalog import DatasetSource
from cascade_det.data.coco_json import CheckedJson, JsonObject, check_coco_json
from cascade_det.data.image_check import MISSING, check_dataset
from cascade_det.data.image_names import ALL_LINKS, NEAR_LINKS, LinkRule
from cascade_det.data.warnings import boxes_of, find_mistakes
from cascade_det.errors import DatasetError
from cascade_det.masks.segmentation import (
    Segmentation,
    covers_nothing,
    mask_area,
    plain_segmentation,
)
from cascade_det.text import listed

logger = logging.getLogger(__name__)

ON_BAD_DATA = "CASCADE.ON_BAD_DATA"
_DIFFERENCES_SHOWN = 3
# Which classes an image is annotated for, where that is not all.
_OF_LVIS = ("neg_category_ids", "not_exhaustive_category_ids")


@dataclass(frozen=True, eq=False, slots=True)
class ImageRecord:
    """One image with its annotations, in the order of the json.

    Attributes:
        file_name: full path.
        image_id: the id in the json.
        height: pixels, from the json.
        width: pixels, from the json.
        boxes: float32 ``[G, 4]``, XYXY in absolute pixels; may reach outside the image.
        classes: int64 ``[G]`` in ``[0, K)``.
        iscrowd: bool ``[G]``, true for a box around a crowd.
        masks: length G, see :mod:`cascade_det.masks.segmentation`; ``None`` for an object whose
            mask is unknown and for crowds. ``None`` if masks were not read.
    """

    file_name: str
    image_id: int
    height: int
    width: int
    boxes: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int64]
    iscrowd: npt.NDArray[np.bool_]
    masks: tuple[Segmentation | None, ...] | None = None


@dataclass(frozen=True, eq=False)
class CocoDataset:
    """A checked data set.

    Attributes:
        records: sorted by image id.
        class_names: length K, in the order of ``category_ids``.
        category_ids: the category id in the json of each class; ascending, gaps allowed.
        source: where it was read from.
        ground_truth: the reference of an evaluation, in COCO format: ``images``, ``categories``
            (both with what LVIS adds, where the json has it: ``frequency``, ``neg_category_ids``)
            and ``annotations`` (``id``, ``image_id``, ``category_id``, ``bbox``, ``area``,
            ``iscrowd``), the latter only if the json has that key. Boxes of zero width or height
            are included: pycocotools counts them. If masks were read, ``segmentation`` is added, in
            a form that pycocotools can draw, to the objects that have one. Empty unless requested.
        left_out: number of entries left out of ``records`` and ``ground_truth``, by kind of issue.
        left_out_images: the ids of the images among them.
    """

    records: list[ImageRecord]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    source: DatasetSource
    ground_truth: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    left_out_images: frozenset[int] = frozenset()


def load_dataset(
    source: DatasetSource,
    on_bad_data: str = "error",
    *,
    masks: str | None = None,
    keep_ground_truth: bool = False,
    check_images: bool = True,
    decode: bool = False,
    option: str = ON_BAD_DATA,
    links: LinkRule = NEAR_LINKS,
    share: tuple[int, int] = (0, 1),
    gather: Callable[[Any], list[Any]] = lambda findings: [findings],
) -> CocoDataset:
    """Read and check a COCO-format json and the images that it lists.

    A json without the key ``annotations`` is a set for inference, not for training. Boxes of zero
    width or height are never trained on, with a warning: COCO's own training files have a few.

    Args:
        source: the json and the folder of its images.
        on_bad_data: ``"error"`` raises if images or annotations are bad, and lists all of them;
            ``"skip"`` leaves them out and logs how many.
        masks: ``None`` does not read masks. ``"keep"`` reads them, and keeps objects without one,
            or with one of no area, for their boxes; ``"drop"`` leaves objects without one out of
            ``records``, as Detectron2 does.
        keep_ground_truth: whether to keep the annotations for an evaluation.
        check_images: whether to check the image files; otherwise they need not exist, and links
            are not checked either.
        decode: whether to decode each image, so that none fails later.
        option: name of the user's option for ``on_bad_data``, for messages.
        links: which links out of the image folder are followed.
        share: (rank, number of processes) if several processes load the same data set: each opens
            its part of the images.
        gather: maps the findings of this process to those of all processes, by rank; all of them
            then leave out the same images, or raise the same error.

    Raises:
        DatasetError: the file is not COCO-format json, or has bad data that may not be skipped.
    """
    if check_images:
        checked = check_dataset(
            source,
            decode=decode,
            share=share,
            gather=gather,
            links=links,
            masks=masks is not None,
        )
    else:
        checked = check_coco_json(source, ALL_LINKS, masks=masks is not None)
    if checked.unusable or (checked.bad and on_bad_data == "error"):
        raise DatasetError(_refusal(source, checked, option))
    if share[0] == 0:  # all processes know the same
        _log_findings(source, checked)
    class_of = {category_id: index for index, category_id in enumerate(checked.categories)}
    records = [
        _record(image, checked.annotations.get(image_id, []), source, class_of, masks)
        for image_id, image in checked.images.items()
    ]
    if masks is not None and not keep_ground_truth and share[0] == 0:  # an evaluation tells its own
        _log_maskless(source, checked, records, masks)
    return CocoDataset(
        records,
        tuple(checked.categories.values()),
        tuple(checked.categories),
        source,
        ground_truth=_ground_truth(checked) if keep_ground_truth else {},
        left_out=dict(checked.bad.counts),
        left_out_images=frozenset(checked.image_ids - checked.images.keys()),
    )


def left_out_warnings(dataset: CocoDataset, option: str = ON_BAD_DATA) -> list[str]:
    """A warning to report with the metrics of a data set if entries were left out of it.

    Args:
        dataset: the data set that was evaluated.
        option: name of the user's option for ``on_bad_data``.
    """
    if not dataset.left_out:
        return []
    kinds = ", ".join(f"{count} x {kind}" for kind, count in dataset.left_out.items())
    return [f"Left out as {option} is 'skip': {kinds}. The metrics cover the rest."]


def check_same_classes(datasets: Sequence[CocoDataset]) -> None:
    """Check that data sets to be trained on together have the same classes.

    Raises:
        DatasetError: names or category ids differ between two of them.
    """
    for other in datasets[1:]:
        first = datasets[0]
        ours = list(zip(first.category_ids, first.class_names, strict=True))
        theirs = list(zip(other.category_ids, other.class_names, strict=True))
        if ours != theirs:
            raise DatasetError(
                f"data sets {first.source.name!r} and {other.source.name!r} have different "
                f"classes: only the first has {_few(ours, theirs)}; only the second has "
                f"{_few(theirs, ours)} (category id, name). Training sets must agree in both."
            )


def _refusal(source: DatasetSource, checked: CheckedJson, option: str) -> str:
    issues = "\n".join(str(part) for part in (checked.unusable, checked.bad) if part)
    if checked.unusable:
        remedy = "Fix the file."
    else:
        remedy = f"Fix these, or set {option} to 'skip' to leave them out."
    if MISSING in checked.bad.counts and not checked.images:
        remedy += f" No image was found: is {source.image_root} their folder?"
    return f"{source.json_file}: bad data\n{issues}\n{remedy}"


def _log_findings(source: DatasetSource, checked: CheckedJson) -> None:
    for issues in (checked.bad, checked.of_no_area):
        if issues:
            logger.warning("%s: left out\n%s", source.json_file, issues)
    mistakes = find_mistakes(checked)
    mistakes.update(checked.odd_labels)
    if mistakes:
        logger.warning("%s: probably a mistake\n%s", source.json_file, mistakes)
    present = {
        annotation["category_id"]
        for annotations in checked.annotations.values()
        for annotation in annotations
    }
    absent = [name for key, name in checked.categories.items() if key not in present]
    if checked.has_annotations and absent:
        logger.info(
            "%s: no box of %d of %d categories: %s",
            source.json_file,
            len(absent),
            len(checked.categories),
            ", ".join(absent[:10]) + ", ..." * (len(absent) > 10),
        )


def _log_maskless(
    source: DatasetSource, checked: CheckedJson, records: Sequence[ImageRecord], masks: str
) -> None:
    boxes = (b for image in checked.images.values() for b in boxes_of(checked, image))
    objects = sum(not box.get("iscrowd", 0) for box in boxes)
    with_mask = sum(mask is not None for record in records for mask in record.masks or ())
    if objects > with_mask:
        text = {
            "keep": "have no mask, or one of no area: only their boxes are trained on",
            "drop": "have no mask: they are left out of training",
        }
        counts = (source.json_file, objects - with_mask, objects)
        logger.warning("%s: %d of %d objects %s (see CASCADE.MASKLESS)", *counts, text[masks])


def _record(
    image: JsonObject,
    annotations: list[JsonObject],
    source: DatasetSource,
    class_of: dict[int, int],
    masks: str | None,
) -> ImageRecord:
    annotations = [entry for entry in annotations if min(entry["bbox"][2:]) > 0]
    if masks == "drop":
        annotations = [e for e in annotations if "segmentation" in e or e.get("iscrowd", 0)]
    boxes = np.array([entry["bbox"] for entry in annotations], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]  # XYWH to XYXY
    return ImageRecord(
        file_name=os.path.join(source.image_root, image["file_name"]),
        image_id=image["id"],
        height=image["height"],
        width=image["width"],
        boxes=boxes,
        classes=np.array([class_of[entry["category_id"]] for entry in annotations], np.int64),
        iscrowd=np.array([entry.get("iscrowd", 0) for entry in annotations], np.bool_),
        masks=None if masks is None else tuple(_mask(entry, masks) for entry in annotations),
    )


def _mask(annotation: JsonObject, masks: str) -> Segmentation | None:
    mask: Segmentation | None = annotation.get("segmentation")
    if mask is None or annotation.get("iscrowd", 0):
        return None
    return None if masks == "keep" and covers_nothing(mask) else mask


def _ground_truth(checked: CheckedJson) -> dict[str, Any]:
    """The usable entries, with only the keys that an evaluation reads."""
    content: dict[str, Any] = {
        "images": [
            {key: image[key] for key in ("id", "file_name", "height", "width")}
            | {key: image[key] for key in _OF_LVIS if isinstance(image.get(key), list)}
            for image in checked.images.values()
        ],
        "categories": [
            {"id": category_id, "name": name, **_frequency(checked, category_id)}
            for category_id, name in checked.categories.items()
        ],
    }
    if checked.has_annotations:
        content["annotations"] = [
            _true_object(annotation, image)
            for image_id, image in checked.images.items()
            for annotation in checked.annotations.get(image_id, [])
        ]
    return content


def _frequency(checked: CheckedJson, category_id: int) -> dict[str, str]:
    found = checked.frequencies.get(category_id)
    return {} if found is None else {"frequency": found}


def _true_object(annotation: JsonObject, image: JsonObject) -> JsonObject:
    _, _, width, height = annotation["bbox"]
    area = annotation.get("area")
    mask = annotation.get("segmentation")
    size = image["height"], image["width"]
    if area is None:
        area = width * height if mask is None else mask_area(mask, *size)
    return {
        **{key: annotation[key] for key in ("id", "image_id", "category_id", "bbox")},
        **({} if mask is None else {"segmentation": plain_segmentation(mask, *size)}),
        "area": area,
        "iscrowd": int(annotation.get("iscrowd", 0)),
    }


def _few(these: list[tuple[int, str]], those: list[tuple[int, str]]) -> str:
    missing = [entry for entry in these if entry not in those]
    return listed([*map(str, missing)], _DIFFERENCES_SHOWN) or "none"

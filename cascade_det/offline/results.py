"""Predictions of finished parts as the content of COCO's json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from cascade_det.data.coco_results import (
    PREDICTIONS_FILE,
    area_of,
    coco_results,
    json_items,
)
from cascade_det.errors import DatasetError
from cascade_det.masks.rle import compressed
from cascade_det.offline.folder import OutputFolder
from cascade_det.offline.parquet import read_metadata, read_rows
from cascade_det.offline.plan import PARTS, RUN_FILE, missing_parts, read_run
from cascade_det.onnx_predictor import ArrayDetections
from cascade_det.text import listed, printable

_IMAGE = ("id", "path", "height", "width", "error")
_DETECTIONS = ("id", "height", "width", "boxes", "scores", "classes", "exit_stages", "masks")
_MOST_SHOWN = 3


class Results:
    """Predictions in parquet: the parts of a complete run, or one file.

    Args:
        source: the folder of a run, or a file ``.parquet`` of predictions.

    Raises:
        DatasetError: parts are missing, or the source is something else.
        CascadeDetError: it cannot be read.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        if source.lower().endswith(".parquet"):
            self._files = [(source, -1)]
            model = read_metadata(source)
        else:
            folder = OutputFolder(source)
            run = read_run(folder)
            model = run["model"]
            missing = missing_parts(folder, [name for name, _ in run["parts"]])
            if missing:
                raise DatasetError(
                    f"{folder}: {len(missing)} of {len(run['parts'])} parts are not done "
                    f"({printable(listed(missing, _MOST_SHOWN))}). Run predict again with the same "
                    "arguments, or the shares that are left: it does the missing ones."
                )
            self._files = [(folder.address(f"{PARTS}/{name}"), n) for name, n in run["parts"]]
        self._ids, self.categories = _classes_of(model, source)

    def images(self) -> Iterator[dict[str, Any]]:
        """COCO's ``images``; of those that did not fail."""
        for row in self._rows(_IMAGE):
            if row["error"] is None:
                image = {"id": row["id"], "file_name": row["path"]}
                yield image | {"height": row["height"], "width": row["width"]}

    def failed(self) -> Iterator[dict[str, str]]:
        """Names of images that failed, and why."""
        for row in self._rows(_IMAGE):
            if row["error"] is not None:
                yield {"file_name": row["path"], "reason": row["error"]}

    def annotations(self) -> Iterator[dict[str, Any]]:
        """COCO's ``annotations``, with scores and exit stages, as ``predict`` writes them."""
        number = 0
        for row in self._rows(_DETECTIONS):
            for entry in _entries(row, self._ids, self._source):
                number += 1
                yield entry | {"id": number, "area": area_of(entry), "iscrowd": 0}

    def _rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        for address, size in self._files:
            count = 0
            for row in read_rows(address, columns):
                count += 1
                yield row
            if size not in (-1, count):
                raise DatasetError(f"{printable(address)}: has {count} images, not {size}")


def _classes_of(model: Mapping[str, Any], source: str) -> tuple[list[int], list[dict[str, Any]]]:
    ids, names = model.get("category_ids"), model.get("class_names")
    if (
        not isinstance(ids, list)
        or not isinstance(names, list)
        or len(ids) != len(names)
        or any(type(number) is not int for number in ids)
        or any(not isinstance(name, str) for name in names)
    ):
        raise DatasetError(f"{printable(source)}: has no names and ids of its classes")
    categories = [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)]
    return ids, categories


def _entries(row: Mapping[str, Any], ids: Sequence[int], source: str) -> list[dict[str, Any]]:
    """The detections of a row, which may be of a file from elsewhere, in COCO's result format."""
    try:
        found = ArrayDetections(
            boxes=np.array(row["boxes"], np.float32).reshape(len(row["scores"]), 4),
            scores=np.array(row["scores"], np.float32),
            classes=np.array(row["classes"], np.int64),
            exit_stages=np.array(row["exit_stages"], np.int64),
        )
        masks = row["masks"]
        if masks is not None:
            # pycocotools reads them without a check.
            size = row["height"], row["width"]
            masks = [None if mask is None else compressed(mask, *size) for mask in masks]
        return coco_results(found, row["id"], ids, masks)
    except (ValueError, TypeError) as error:
        raise DatasetError(
            f"{printable(source)}: the row of the image {row['id']} cannot be used: {error}"
        ) from error


def is_parquet_source(source: str) -> bool:
    """Whether predictions are in parquet: a file, or the folder of a run."""
    return source.lower().endswith(".parquet") or (Path(source) / RUN_FILE).is_file()


def read_predictions(source: str) -> dict[str, Any]:
    """All of ``Results`` at once, as the content of a ``predictions.json``."""
    results = Results(source)
    return {
        "images": list(results.images()),
        "annotations": list(results.annotations()),
        "failed": list(results.failed()),
        "categories": results.categories,
    }


def merge(folder: OutputFolder) -> tuple[str, int]:
    """Write ``predictions.json`` from all parts, of which one is in memory at a time.

    Returns:
        Its address, and how many images failed.

    Raises:
        DatasetError: parts are missing.
    """
    results = Results(folder.address("").rstrip("/"))
    failed = 0

    def counted() -> Iterator[dict[str, str]]:
        nonlocal failed
        for entry in results.failed():
            failed += 1
            yield entry

    def write(file: IO[bytes]) -> None:
        lists = {
            "images": results.images(),
            "annotations": results.annotations(),
            "failed": counted(),
        }
        start = "{"
        for name, items in lists.items():
            file.write(f'{start}"{name}": ['.encode())
            file.writelines(text.encode() for text in json_items(items))
            start = "\n],\n"
        file.write(f'\n],\n"categories": {json.dumps(results.categories)}}}\n'.encode())

    folder.write_with(PREDICTIONS_FILE, write)
    return folder.address(PREDICTIONS_FILE), failed

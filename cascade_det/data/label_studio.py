"""Label Studio's tasks, to correct annotations or predictions there; only written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cascade_det.data.issues import Issues
from cascade_det.data.label_files import JsonObject, objects_of, relative_name

# What a labelling interface calls its tags in Label Studio's own templates.
FROM_NAME, TO_NAME, DATA_KEY = "label", "image", "image"
# Prefixes of addresses that a browser opens; the keys of s3:// and the like are taken literally.
_OF_BROWSER = ("/", "http://", "https://")


def label_studio_tasks(
    content: JsonObject,
    image_root: Path,
    image_url: str,
    dropped: Issues,
    predictions: Sequence[JsonObject] | None = None,
) -> list[JsonObject]:
    """One task for each image: its objects as ``annotations``, or predictions for review.

    Args:
        content: ``ground_truth`` of a data set.
        image_root: the folder of its images.
        image_url: what precedes the name of an image in that folder; behind one that a browser
            opens, names are percent-encoded, as by Label Studio's own storage.
        dropped: gets what is not written: crowds, empty boxes and masks.
        predictions: in COCO's result format; they become ``predictions``, which Label Studio shows
            as pre-annotations, in place of the objects.

    Raises:
        DatasetError: the name of an image cannot be written.
    """
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    by_image: dict[int, list[JsonObject]] = defaultdict(list)
    for prediction in predictions or ():
        by_image[prediction["image_id"]].append(prediction)
    tasks = []
    for image, entries in objects_of(content, dropped):
        found = entries if predictions is None else by_image[image["id"]]
        kind = "mask (only boxes are written)"
        for number, entry in enumerate(found, start=1):
            if entry.get("segmentation"):
                dropped.add(kind, "image {}, object {}".format, image["id"], number)
        results = [
            _result(entry, names[entry["category_id"]], image, number)
            for number, entry in enumerate(found, start=1)
        ]
        file_name = relative_name(image["file_name"], image_root)
        if image_url.startswith(_OF_BROWSER):
            file_name = quote(file_name)
        task: JsonObject = {"data": {DATA_KEY: image_url + file_name}}
        if predictions is None:
            task["annotations"] = [{"result": results}]
        else:
            scores = [entry["score"] for entry in found]
            # Label Studio sorts tasks by this score; the least certain object asks for review.
            score = min(scores, default=0.0)
            prediction = {"model_version": "cascade_det", "score": score, "result": results}
            task["predictions"] = [prediction]
        tasks.append(task)
    return tasks


def _result(entry: JsonObject, name: str, image: JsonObject, number: int) -> JsonObject:
    left, top, width, height = entry["bbox"]
    columns, rows = image["width"], image["height"]
    value: dict[str, Any] = {
        "x": 100 * left / columns,
        "y": 100 * top / rows,
        "width": 100 * width / columns,
        "height": 100 * height / rows,
        "rotation": 0,
        "rectanglelabels": [name],
    }
    result: JsonObject = {
        "id": f"{image['id']}-{number}",
        "type": "rectanglelabels",
        "from_name": FROM_NAME,
        "to_name": TO_NAME,
        "original_width": columns,
        "original_height": rows,
        "image_rotation": 0,
        "value": value,
    }
    return result | ({"score": entry["score"]} if "score" in entry else {})

"""A random ground truth with noisy detections, and its AP by pycocotools alone."""

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cascade_det.core.structures import Detections

CATEGORY_IDS = (3, 7, 9)
ROWS = {"AP": slice(None), "AP50": 0, "AP75": 5, "AP90": 8}


def random_case(seed, *, num_images=12, max_objects=6, noise=2.0):
    """A ground truth with crowds, and per image noisy copies of it and false positives."""
    rng = np.random.default_rng(seed)
    annotations, found = [], {}
    for image_id in range(1, num_images + 1):
        count = int(rng.integers(0, max_objects))
        sizes = rng.choice([25, 60, 110], (count, 1)) * rng.uniform(0.8, 1.2, (count, 2))
        boxes = np.concatenate([rng.uniform(0, 200, (count, 2)), sizes], 1)
        classes = rng.integers(0, 3, count)
        for box, index in zip(boxes.tolist(), classes.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": CATEGORY_IDS[index],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(rng.random() < 0.2),
                }
            )
        guesses = np.concatenate([boxes] * 3) + rng.normal(0, noise, (3 * count, 4))
        guesses = torch.from_numpy(guesses.clip(1)).float()
        guesses[:, 2:] += guesses[:, :2]
        found[image_id] = Detections(
            guesses,
            torch.from_numpy(rng.random(3 * count)).float(),
            torch.from_numpy(np.where(rng.random(3 * count) < 0.2, 0, np.tile(classes, 3))),
            torch.from_numpy(rng.integers(0, 3, 3 * count)),
        )
    return content_of(range(1, num_images + 1), annotations), found


def content_of(image_ids, annotations):
    """Content of a json."""
    return {
        "images": [{"id": image_id, "height": 300, "width": 300} for image_id in image_ids],
        "categories": [{"id": number, "name": str(number)} for number in CATEGORY_IDS],
        "annotations": annotations,
    }


def run_pycocotools(content, found, *, image_ids=None, category_ids=CATEGORY_IDS, limit=100):
    """A ``COCOeval`` of detections by image, on float64 sizes; ``limit`` per class and image."""
    truth = COCO()
    # Ids above 0: pycocotools takes the id of the matched object for "was matched".
    annotations = [{**item, "id": n} for n, item in enumerate(content["annotations"], start=1)]
    truth.dataset = {**content, "annotations": annotations}
    truth.createIndex()
    rows = [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for image_id, of_image in found.items()
        for (x1, y1, x2, y2), score, label in zip(
            of_image.boxes.tolist(),
            of_image.scores.tolist(),
            of_image.classes.tolist(),
            strict=True,
        )
    ]
    evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
    evaluation.params.imgIds = list(image_ids or truth.imgs)
    evaluation.params.maxDets = [1, 10, limit]
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def mean_precision(evaluation, row=slice(None), *, category=slice(None), area=0):
    """AP in percent; nan without ground truth."""
    precision = evaluation.eval["precision"][row, ..., category, area, -1]
    valid = precision[precision > -1]
    return 100 * valid.mean() if valid.size else float("nan")


def ap_by_pycocotools(content, found, **options):
    """``AP``, ``AP50``, ``AP75`` and ``AP90`` in percent."""
    evaluation = run_pycocotools(content, found, **options)
    return {name: mean_precision(evaluation, row) for name, row in ROWS.items()}

"""A random ground truth with masks and noisy detections of them, and mask AP by pycocotools."""

import copy
from dataclasses import replace

import numpy as np
import torch
from noisy_detections import random_case
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.nn import functional as F

SIZE = 300  # of the images


def ellipse(box, scale=1.0, points=24):
    """A polygon in a box XYWH, smaller by ``scale``."""
    x, y, width, height = box
    angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
    xs = x + width / 2 * (1 + scale * np.cos(angles))
    ys = y + height / 2 * (1 + scale * np.sin(angles))
    return np.stack([xs, ys], 1).ravel().tolist()


def segmentation_of(box, kind):
    """An object's mask in one of the forms that a json may have."""
    whole = [ellipse(box)]
    if kind == "polygon":
        return whole
    if kind == "polygons":
        x, y, width, height = box
        return [
            ellipse((x, y, width * 0.45, height)),
            ellipse((x + width / 2, y, width / 2, height)),
        ]
    (rle,) = coco_mask.frPyObjects(whole, SIZE, SIZE)
    if kind == "rle":
        return {"size": [SIZE, SIZE], "counts": rle["counts"].decode()}
    pixels = coco_mask.decode([rle])[:, :, 0].T.ravel()
    edges = np.flatnonzero(np.diff(pixels, prepend=0)).tolist()
    return {"size": [SIZE, SIZE], "counts": np.diff([0, *edges, SIZE * SIZE]).tolist()}


def masked_case(seed, **options):
    """``random_case`` with polygons and RLE, and soft masks of 28 x 28 cells."""
    content, found_in = random_case(seed, **options)
    rng = np.random.default_rng(seed)
    for item in content["annotations"]:
        kind = "runs" if item["iscrowd"] else rng.choice(["polygon", "polygons", "rle", "runs"])
        item["segmentation"] = segmentation_of(item["bbox"], kind)
        item["area"] *= np.pi / 4
    for image in content["images"]:
        image["file_name"] = f"{image['id']}.jpg"
    at = torch.linspace(-1, 1, 28)
    for image_id, found in found_in.items():
        boxes = found.boxes.clamp(0, SIZE)
        kept = (boxes[:, 2:] > boxes[:, :2] + 1).all(dim=1)
        generator = torch.Generator().manual_seed(1000 * seed + image_id)
        reach = 0.6 + 0.5 * torch.rand(len(boxes), 1, 1, generator=generator)
        distance = (at[:, None] ** 2 + at**2).sqrt() / reach  # [D, 28, 28]
        noise = torch.randn(distance.shape, generator=generator)
        masks = (8 * (1 - distance) + 0.5 * noise).sigmoid()
        found_in[image_id] = replace(found, boxes=boxes, masks=masks)[kept]
    return content, found_in


def bitmaps(found):
    """The masks of detections in their image, bool ``[D, SIZE, SIZE]``, by grid_sample."""
    pasted = []
    centres = torch.arange(SIZE, dtype=torch.float64) + 0.5
    for mask, (x0, y0, x1, y1) in zip(found.masks.double(), found.boxes.tolist(), strict=True):
        ys, xs = (centres - y0) / (y1 - y0) * 2 - 1, (centres - x0) / (x1 - x0) * 2 - 1
        grid = torch.stack([xs.expand(SIZE, SIZE), ys[:, None].expand(SIZE, SIZE)], dim=-1)
        pasted.append(F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0] >= 0.5)
    return torch.stack(pasted).numpy() if pasted else np.zeros((0, SIZE, SIZE), np.bool_)


def rows_of(found_in, category_ids):
    """Results of images by id, in COCO's format, as another program would write them."""
    rows = []
    for image_id, found in found_in.items():
        encoded = [coco_mask.encode(np.asfortranarray(b, np.uint8)) for b in bitmaps(found)]
        for rle, score, label in zip(
            encoded, found.scores.tolist(), found.classes.tolist(), strict=True
        ):
            rle["counts"] = rle["counts"].decode()
            rows.append(
                {
                    "image_id": image_id,
                    "category_id": category_ids[label],
                    "segmentation": rle,
                    "score": score,
                }
            )
    return rows


def mask_evaluation(content, rows, evaluation_type=COCOeval):
    """A ``COCOeval`` of masks, with pycocotools' own reading of results."""
    truth = COCO()
    truth.dataset = copy.deepcopy(content)
    truth.createIndex()
    evaluation = evaluation_type(truth, truth.loadRes(copy.deepcopy(rows)), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation

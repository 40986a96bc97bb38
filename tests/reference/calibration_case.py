"""A detector of random weights, and a data set whose objects are where it finds something.

Half of the detections of the full cascade, a little displaced, are the ground truth: exits have
something to lose, and nothing was trained.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from pycocotools import mask as coco_mask

from cascade_det.config import load_config
from cascade_det.standalone.build import build_detector
from make_shapes import make_dataset

INSTANT = Path(__file__).resolve().parents[2] / "configs" / "quick_schedules" / "instant_test.yaml"
SETTINGS = (
    *("INPUT.MIN_SIZE_TEST", 0, "DATALOADER.NUM_WORKERS", 0, "CASCADE.TEST_IMS_PER_BATCH", 2),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", 60, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.2),
)


@dataclass
class CalibrationCase:
    """Files, and the options with which either host finds them.

    Attributes:
        folder: of the images ``val/`` and of ``truth.json``.
        options: ``KEY VALUE`` pairs.
    """

    folder: Path
    options: list[str]

    @property
    def truth(self):
        return json.loads((self.folder / "truth.json").read_text())

    def with_truth(self, name, content):
        """Options with another ground truth, which is written for it."""
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(content))
        datasets = [(name, str(path), str(self.folder / "val"))]
        return [*self.options, "CASCADE.DATASETS", str(datasets), "DATASETS.TEST", f"('{name}',)"]


def make_calibration_case(folder, *, images, learned=(), masks=False, backbone=()):
    """A case in an empty folder; with ``masks`` the objects have those of the detections.

    ``backbone`` are options of another one.
    """
    make_dataset(folder / "shapes", train=0, val=images, width=128, height=96, hard=0.0)
    options = [str(value) for value in (*SETTINGS, *backbone)]
    if learned:
        options += [
            "MODEL.CASCADE.EXIT.ENABLED",
            "True",
            "MODEL.CASCADE.EXIT.LEARNED",
            str(learned),
        ]
    if masks:
        options += ["MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NUM_CONV", "0"]
        options += ["MODEL.ROI_MASK_HEAD.CONV_DIM", "4"]
    torch.manual_seed(0)
    detector = build_detector(load_config(INSTANT, options)).eval()
    for predictor in detector.roi_heads.box_predictor:
        torch.nn.init.normal_(predictor.cls_score.weight, std=30.0)
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=1.0)
    if masks:
        torch.nn.init.normal_(detector.roi_heads.mask_head.predictor.weight, std=5.0)
    if learned:
        for parameter in detector.roi_heads.exits.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    weights = folder / "weights.pth"
    torch.save({"model": detector.state_dict()}, weights)
    detector.set_exits(None)
    case = CalibrationCase(folder / "shapes", [*options, "MODEL.WEIGHTS", str(weights)])
    content = json.loads((case.folder / "val.json").read_text())
    content["annotations"] = list(_found(detector, case.folder, content))
    case.options = case.with_truth("truth", content)
    return case


def _found(detector, folder, content):
    generator = torch.Generator().manual_seed(0)
    number = 0
    for image in content["images"]:
        pixels = torch.from_numpy(cv2.imread(str(folder / "val" / image["file_name"])))
        (found,) = detector.detect([{"image": pixels.permute(2, 0, 1)}]).detections
        moved = found.boxes + torch.randn(len(found), 4, generator=generator) * 1.5
        found.boxes = moved
        pasted = [None] * len(found) if found.masks is None else found.paste(96, 128).numpy()
        rows = zip(moved.tolist(), found.classes.tolist(), pasted, strict=True)
        for box, index, bitmap in list(rows)[::2]:
            x, y = max(box[0], 0.0), max(box[1], 0.0)
            size = [min(box[2], 128.0) - x, min(box[3], 96.0) - y]
            if min(size) <= 0:
                continue  # moved out of the image
            number += 1
            yield {
                "id": number,
                "image_id": image["id"],
                "category_id": content["categories"][index]["id"],
                "bbox": [x, y, *size],
                "area": size[0] * size[1],
                "iscrowd": 0,
                **({} if bitmap is None else {"segmentation": _rle(bitmap)}),
            }


def _rle(bitmap):
    rle = coco_mask.encode(np.asfortranarray(bitmap.astype(np.uint8)))
    return {**rle, "counts": rle["counts"].decode()}

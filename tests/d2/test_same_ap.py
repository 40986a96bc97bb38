"""The same AP in both hosts: on the same detections, and for a checkpoint from end to end."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.mask import encode

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultPredictor
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.structures import Boxes, Instances
from noisy_detections import random_case
from shape_runs import ROOT
from two_hosts import (
    BACKBONES,
    CONFIG,
    EXITS,
    MASKS,
    OUR_HEADS,
    OWN_HEADS,
    SMALL,
    detectron2_cfg,
    in_detectron2,
    stir,
)

from cascade_det.config import load_config
from cascade_det.core import CascadeStats, Detections, DetectorOutput
from cascade_det.d2.evaluate import coco_evaluator
from cascade_det.evaluation import CocoEvaluator
from cascade_det.standalone import evaluate

pytestmark = pytest.mark.needs_detectron2

# Ids neither consecutive nor from 1, and one class without objects.


def assert_same_metrics(got, wanted, tolerance):
    """Return the largest difference."""
    # Detectron2 does not report AP90.
    assert got.keys() == {*wanted, "AP90"}
    got = {name: got[name] for name in wanted}
    assert {n for n in got if math.isnan(got[n])} == {n for n in wanted if math.isnan(wanted[n])}
    largest = max(abs(got[name] - x) for name, x in wanted.items() if not math.isnan(x))
    assert largest <= tolerance, (got, wanted)
    return largest


def register(name, json_file, folder):
    register_coco_instances(name, {}, str(json_file), str(folder))
    # Reading it is what gives the metadata its categories.
    DatasetCatalog.get(name)


@pytest.mark.parametrize(("limit", "seed"), [(100, 0), (100, 1), (250, 0), (250, 1)])
def test_of_the_same_detections(limit, seed, tmp_path, record_property):
    """Many detections, some of one score; two classes of one name, and one without objects."""
    truth, found_in = random_case(seed)
    truth["categories"].append({"id": 30, "name": "nothing"})
    for category in truth["categories"][:2]:
        category["name"] = "cell"
    for image in truth["images"]:
        image["file_name"] = f"{image['id']}.jpg"
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    name = f"one_name_{limit}_{seed}"
    register(name, tmp_path / "truth.json", tmp_path)
    cfg = get_cfg()
    cfg.TEST.DETECTIONS_PER_IMAGE = limit
    own = COCOEvaluator(name, distributed=False, max_dets_per_image=limit)
    in_our_host = coco_evaluator(cfg, name)
    ours = CocoEvaluator(
        ground_truth=truth,
        category_ids=[category["id"] for category in truth["categories"]],
        detections_per_image=limit,
    )
    own.reset()
    in_our_host.reset()
    for image_id, found in found_in.items():
        # Guesses with high scores before them: a limit of 100 takes those that hit away.
        boxes = torch.cat([torch.tensor([[0.0, 0, 9, 9]]).repeat(110, 1), found.boxes])
        scores = torch.cat([torch.linspace(1, 0.5, 110), 0.4 * found.scores.round(decimals=2)])
        classes = torch.cat([torch.zeros(110, dtype=torch.int64), found.classes])
        found = Detections(boxes, scores, classes, torch.zeros_like(classes))
        sample = [{"image_id": image_id}]
        ours.process(sample, DetectorOutput([found], CascadeStats([], [])))
        fields = {"pred_boxes": Boxes(boxes), "scores": scores, "pred_classes": classes}
        for evaluator in (own, in_our_host):
            evaluator.process(sample, [{"instances": Instances((300, 300), **fields)}])
    got, wanted = ours.evaluate()["bbox"], in_our_host.evaluate()["bbox"]
    record_property("largest", assert_same_metrics(got, wanted, 1e-9))
    assert {"AP-cell (id 3)", "AP-cell (id 7)", "AP-9", "AP-nothing"} <= wanted.keys()
    assert all(wanted[name] > 0 for name in ("AP", "AP50", "AP75", "APs", "APm", "APl"))
    plain = own.evaluate()["bbox"]
    assert plain["AP"] == pytest.approx(wanted["AP"], abs=1e-9)
    assert plain["AP-cell"] == pytest.approx(wanted["AP-cell (id 7)"], abs=1e-9)
    # The guesses fill a limit of 100.
    assert (wanted["AP-cell (id 3)"] > 0) == (limit > 100)


R18 = BACKBONES["R-18"]
INPUT = ("INPUT.MIN_SIZE_TEST", 112, "INPUT.MAX_SIZE_TEST", 150)
AUGMENTED = ("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (0,))


@pytest.fixture
def photographs():
    """The folder of real ones."""
    shared = Path(os.environ.get("CASCADE_DET_TEST_DATA", ROOT.parent / "shared" / "data"))
    folder = shared / "coco_mini" / "images"
    if not folder.is_dir():
        pytest.skip(f"no real photographs at {folder}")
    return folder


@pytest.fixture
def drawings(shapes):
    return shapes / "train"


def make_checkpoint(folder, options):
    """Random weights that find something everywhere."""
    torch.manual_seed(0)
    own = in_detectron2(*R18, *options)
    stir(own.model)
    DetectionCheckpointer(own.model, folder).save("model")
    return str(folder / "model.pth")


def make_truth(path, folder, options):
    """Ground truth that a model can find: half of what it does find, a little displaced."""
    predictor = DefaultPredictor(detectron2_cfg(options))
    generator = np.random.default_rng(0)
    truth = {"images": [], "annotations": [], "categories": []}
    truth["categories"] = [{"id": 2 * i + 1, "name": f"class {i}"} for i in range(7)]
    files = sorted(folder.glob("*.jpg"))[:4]
    for image_id, file in enumerate(files, start=1):
        pixels = np.array(Image.open(file).convert("RGB"))[:, :, ::-1]
        height, width = pixels.shape[:2]
        truth["images"].append(
            {"id": image_id, "file_name": file.name, "height": height, "width": width}
        )
        found = predictor(pixels)["instances"][:40:2]
        masks = [None] * len(found)
        if found.has("pred_masks"):
            masks = [encode(np.asfortranarray(mask)) for mask in found.pred_masks.byte().numpy()]
        for (x0, y0, x1, y1), index, mask in zip(
            found.pred_boxes.tensor.tolist(), found.pred_classes.tolist(), masks, strict=True
        ):
            w, h = x1 - x0, y1 - y0
            x0, y0 = generator.normal([x0, y0], [0.04 * w, 0.04 * h]).clip(0).tolist()
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": 2 * index + 1,
                    "bbox": [x0, y0, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
            if mask is not None:
                mask["counts"] = mask["counts"].decode()
                truth["annotations"][-1]["segmentation"] = mask
    path.write_text(json.dumps(truth))


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("images", "heads"),
    [
        ("photographs", OWN_HEADS),
        ("drawings", (*OUR_HEADS, *EXITS)),
        ("drawings", (*OWN_HEADS, *MASKS, "TEST.DETECTIONS_PER_IMAGE", 40)),
    ],
    ids=["plain", "exits", "masks"],
)
def test_of_a_checkpoint_from_end_to_end(images, heads, tmp_path, request, record_property):
    """Each host reads the weights and the images itself."""
    checkpoint = make_checkpoint(tmp_path, heads)
    folder, json_file = request.getfixturevalue(images), tmp_path / "truth.json"
    options = [
        *(*SMALL, *R18, *INPUT, *heads, "MODEL.WEIGHTS", checkpoint),
        *("DATASETS.TEST", ("found",), "OUTPUT_DIR", str(tmp_path / "output"), *AUGMENTED),
    ]
    make_truth(json_file, folder, options)
    register("found", json_file, folder)
    cfg = detectron2_cfg(options)
    model = build_model(cfg)
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    wanted, augmented = (
        inference_on_dataset(
            detector,
            build_detection_test_loader(cfg, "found"),
            COCOEvaluator("found", distributed=False),
        )
        for detector in (model, GeneralizedRCNNWithTTA(cfg, model))
    )

    options += ["CASCADE.DATASETS", [("found", str(json_file), str(folder))]]
    got = evaluate(load_config(CONFIG, options))
    for task, metrics in wanted.items():
        assert metrics["AP"] > 10
        record_property(f"{task}/AP", metrics["AP"])
        largest = assert_same_metrics(got[task], metrics, 0.1)
        record_property(f"{task}/largest", largest)
        assert augmented[task]["AP"] != pytest.approx(metrics["AP"], abs=1)
        assert augmented[task]["AP"] > 1
        largest = assert_same_metrics(got[f"{task}_TTA"], augmented[task], 0.1)
        record_property(f"{task}_TTA/largest", largest)
    assert {"bbox", "segm"} & got.keys() == wanted.keys()

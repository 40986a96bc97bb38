"""Masks in images and their AP, against the real Detectron2."""

import json

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.layers import paste_masks_in_image
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from noisy_masks import masked_case

from cascade_det.core import CascadeStats, DetectorOutput
from cascade_det.evaluation import CocoEvaluator
from cascade_det.masks.pasting import paste_masks
from cascade_det.masks.rle import encode_pasted

pytestmark = pytest.mark.needs_detectron2


@given(st.integers(0, 2**31), st.sampled_from([(37, 53), (60, 21)]))
@settings(max_examples=60)
def test_pasted_pixels_are_detectron2s(seed, size):
    rng = np.random.default_rng(seed)
    height, width = size
    masks = rng.random((4, 28, 28), np.float32) ** rng.choice([0.2, 1, 3])
    corners = rng.uniform(0, 1, (4, 2, 2)) * (width, height)
    # Inside the image, as those that Detectron2 pastes; some with sides of whole pixels.
    corners = np.round(corners) if seed % 3 == 0 else corners
    low, high = corners.min(axis=1), corners.max(axis=1) + 0.1
    boxes = np.concatenate([low, np.minimum(high, (width, height))], axis=1).astype(np.float32)
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)]
    masks = masks[: len(boxes)]
    tensors = torch.from_numpy(masks), torch.from_numpy(boxes)
    # At other thresholds it shows what is close to this one.
    wanted, surely, maybe = (
        paste_masks_in_image(*tensors, size, threshold).numpy()
        for threshold in (0.5, 0.5001, 0.4999)
    )
    pasted = paste_masks(masks, boxes, height, width)
    decided = surely == maybe
    np.testing.assert_array_equal(pasted[decided], wanted[decided])
    assert decided.mean() > 0.99
    for rle, bitmap in zip(encode_pasted(masks, boxes, *size), pasted, strict=True):
        encoded = coco_mask.encode(np.asfortranarray(bitmap, np.uint8))
        assert rle["counts"] == encoded["counts"].decode()


@pytest.mark.parametrize("seed", [0, 1])
def test_mask_ap_is_detectron2s(seed, tmp_path):
    truth, found_in = masked_case(seed)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    name = f"masked_{seed}"
    register_coco_instances(name, {}, str(tmp_path / "truth.json"), str(tmp_path))
    DatasetCatalog.get(name)
    wanted = COCOEvaluator(name, distributed=False, max_dets_per_image=100)
    wanted.reset()
    ours = CocoEvaluator(
        ground_truth=truth, category_ids=[category["id"] for category in truth["categories"]]
    )
    for image_id, found in found_in.items():
        sample = [{"image_id": image_id}]
        ours.process(sample, DetectorOutput([found], CascadeStats([], [])))
        instances = Instances(
            (300, 300),
            pred_boxes=Boxes(found.boxes),
            scores=found.scores,
            pred_classes=found.classes,
            pred_masks=paste_masks_in_image(found.masks, found.boxes, (300, 300)),
        )
        wanted.process(sample, [{"instances": instances}])
    wanted, got = wanted.evaluate(), ours.evaluate()
    for task in ("bbox", "segm"):
        assert 5 < wanted[task]["AP"] < 95
        for metric, value in wanted[task].items():
            # A pixel at 0.5 may be on either side; no IoU here is that close to a threshold.
            assert got[task][metric] == pytest.approx(value, abs=1e-9, nan_ok=True), metric
    assert wanted["segm"]["APs"] != wanted["bbox"]["APs"]

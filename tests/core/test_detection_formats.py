"""Detections in other programs' forms, read by those programs."""

import json
import sys

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from cascade_det.core import Detections
from cascade_det.errors import DatasetError

SIZE = (40, 60)  # height, width
CORNERS = ("xmin", "ymin", "xmax", "ymax")
NAMES = ("cell", "nucleus", "debris")


def make_detections(*, masks=False):
    return Detections(
        torch.tensor([[10.9, 5.25, 30.5, 25.99], [0.0, 0.0, 7.5, 8.5], [20.0, 10.0, 59.6, 40.0]]),
        torch.tensor([0.9, 0.625, 0.25]),
        torch.tensor([2, 0, 1]),
        torch.tensor([0, 2, 1]),
        _checkered() if masks else None,
    )


def _checkered():
    """Masks of 4 x 4 cells: whole, none, and the upper left quarter."""
    masks = torch.ones(3, 4, 4)
    masks[1] = 0
    masks[2, 2:] = masks[2, :, 2:] = 0
    return masks


def no_detections(**arguments):
    return make_detections(**arguments)[:0]


def test_dicts_are_those_of_hugging_face():
    """Its pipeline truncates: ``box.int().tolist()`` in ``_get_bounding_box``."""
    assert make_detections().to_dicts(NAMES) == [
        {
            "score": pytest.approx(0.9),
            "label": "debris",
            "box": {"xmin": 10, "ymin": 5, "xmax": 30, "ymax": 25},
        },
        {"score": 0.625, "label": "cell", "box": {"xmin": 0, "ymin": 0, "xmax": 7, "ymax": 8}},
        {
            "score": 0.25,
            "label": "nucleus",
            "box": {"xmin": 20, "ymin": 10, "xmax": 59, "ymax": 40},
        },
    ]
    found = make_detections().to_dicts()
    assert [entry["label"] for entry in found] == ["class 2", "class 0", "class 1"]
    assert all(type(x) is int for entry in found for x in entry["box"].values())
    assert json.loads(json.dumps(found)) == found
    assert no_detections().to_dicts(NAMES) == []


@pytest.mark.parametrize("masks", [False, True])
def test_coco_results_are_read_by_pycocotools(masks):
    coco = COCO()
    coco.dataset = {
        "images": [{"id": 7, "height": SIZE[0], "width": SIZE[1]}],
        "categories": [{"id": i, "name": n} for i, n in zip((3, 5, 9), NAMES, strict=True)],
        "annotations": [],
    }
    coco.createIndex()
    size = SIZE if masks else None
    results = make_detections(masks=masks).to_coco(7, (3, 5, 9), size=size)
    read = coco.loadRes([r for r in results if not masks or "segmentation" in r])
    loaded = read.loadAnns(read.getAnnIds(imgIds=[7]))
    kept = [0, 2] if masks else [0, 1, 2]
    assert [entry["category_id"] for entry in loaded] == [(9, 3, 5)[i] for i in kept]
    boxes = np.array([entry["bbox"] for entry in loaded])
    boxes[:, 2:] += boxes[:, :2]
    np.testing.assert_allclose(boxes, make_detections().boxes[kept], atol=1e-5)
    if masks:
        pixels = [coco_mask.decode(entry["segmentation"]).astype(bool) for entry in loaded]
        pasted = make_detections(masks=True).paste(*SIZE)[kept].numpy()
        np.testing.assert_array_equal(pixels, pasted)
    assert no_detections(masks=masks).to_coco(7, size=size) == []


def test_coco_results_count_categories_from_1_without_ids():
    assert [r["category_id"] for r in make_detections().to_coco(1)] == [3, 1, 2]


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("make", [make_detections, no_detections])
def test_supervision_gets_all_columns(make, masks):
    supervision = pytest.importorskip("supervision", exc_type=ImportError)
    detections = make(masks=masks)
    found = detections.to_supervision(NAMES, size=SIZE if masks else None)
    assert isinstance(found, supervision.Detections)
    assert len(found) == len(detections)
    np.testing.assert_array_equal(found.xyxy, detections.boxes)
    np.testing.assert_array_equal(found.confidence, detections.scores)
    np.testing.assert_array_equal(found.class_id, detections.classes)
    np.testing.assert_array_equal(found.data["exit_stage"], detections.exit_stages)
    assert found.data["class_name"].tolist() == [NAMES[k] for k in detections.classes]
    assert (found.mask is None) is not masks
    if masks:
        assert found.mask.dtype == bool
        np.testing.assert_array_equal(found.mask, detections.paste(*SIZE))


def test_supervision_works_with_what_it_gets():
    supervision = pytest.importorskip("supervision", exc_type=ImportError)
    found = make_detections(masks=True).to_supervision(NAMES, size=SIZE)
    best = found[found.confidence > 0.5]
    assert best.data["class_name"].tolist() == ["debris", "cell"]
    scene = np.zeros((*SIZE, 3), np.uint8)
    assert supervision.BoxAnnotator().annotate(scene.copy(), found).any()
    assert supervision.MaskAnnotator().annotate(scene.copy(), found).any()


def test_missing_facts_are_asked_for():
    with pytest.raises(ValueError, match=r"size=\(height, width\)"):
        make_detections(masks=True).to_coco(1)
    with pytest.raises(ValueError, match=r"size=\(height, width\)"):
        make_detections(masks=True).to_supervision()
    with pytest.raises(ValueError, match=r"class_names has 2 names.* class 2"):
        make_detections().to_dicts(NAMES[:2])
    with pytest.raises(DatasetError, match=r"class indices 0 to 2.* has 2 classes"):
        make_detections().to_coco(1, (4, 5))


def test_without_supervision_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match=r"the extra \[supervision\]"):
        make_detections().to_supervision()

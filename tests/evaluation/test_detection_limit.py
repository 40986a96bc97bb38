"""How many detections of a class count in an image: against pycocotools with its maxDets set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from noisy_detections import ap_by_pycocotools, mean_precision, run_pycocotools
from recorded_trials import match_images

from cascade_det.calibration.bootstrap import average_precision
from cascade_det.core.structures import CascadeStats, Detections, DetectorOutput, StageOutput
from cascade_det.data.coco_results import coco_results
from cascade_det.evaluation import CocoEvaluator, StageEvaluator, coco_ap, score_results
from cascade_det.evaluation.ap_warnings import too_many_objects_warning
from cascade_det.evaluation.ground_truth import load_ground_truth

IDS = (3, 7)
SIZES = {"AP": 0, "APs": 1, "APm": 2, "APl": 3}


@pytest.fixture(scope="module")
def crowded():
    """An image with 120 bees and 20 flies, one with fewer; most are found, some boxes are off.

    Returns the content of the json, and detections by image.
    """
    rng = np.random.default_rng(0)
    annotations, found = [], {}
    for image_id, count in ((1, 140), (2, 20)):
        places = (
            np.stack(np.meshgrid(np.arange(20), np.arange(10)), -1).reshape(-1, 2)[:count] * 40.0
        )
        sides = rng.choice([12, 36], (count, 1)).repeat(2, axis=1)
        boxes = np.concatenate([places, places + sides], axis=1)
        classes = np.arange(count) // (count - 20 or 10)
        for box, index in zip(boxes, classes, strict=True):
            x, y, right, bottom = box.tolist()
            item = {"bbox": [x, y, right - x, bottom - y], "area": (right - x) * (bottom - y)}
            place = {"image_id": image_id, "category_id": IDS[index]}
            annotations.append({"id": len(annotations) + 1, "iscrowd": 0, **place, **item})
        scores = rng.uniform(0.2, 1, count).round(2)
        boxes += rng.normal(0, 1, (count, 4)) + 30 * (rng.random((count, 1)) < 0.2)
        order = np.argsort(-scores, kind="stable")
        found[image_id] = Detections(
            torch.tensor(boxes[order], dtype=torch.float32),
            torch.tensor(scores[order], dtype=torch.float32),
            torch.tensor(classes[order]),
            torch.zeros(count, dtype=torch.int64),
        )
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 800, "height": 400} for i in (1, 2)],
        "categories": [{"id": 3, "name": "bee"}, {"id": 7, "name": "fly"}],
        "annotations": annotations,
    }
    return content, found


@pytest.mark.parametrize("limit", [40, 110, 400])
def test_every_figure_counts_as_many_as_pycocotools(crowded, limit):
    content, found = crowded
    rows = [row for item in found.items() for row in coco_results(item[1], item[0], IDS)]
    expected = run_pycocotools(content, found, category_ids=IDS, limit=limit)
    truth = load_ground_truth(content)
    scored = score_results(truth, rows, [1, 2], score_threshold=0.3, max_detections=limit)
    for name, area in SIZES.items():
        value = scored["bbox"][name]
        wanted = mean_precision(expected, area=area)
        assert value == pytest.approx(wanted, abs=1e-9, nan_ok=True)
    assert coco_ap(truth, rows, [1, 2], max_detections=limit) == pytest.approx(
        scored["bbox"], nan_ok=True
    )
    matched = match_images(content, IDS, found, max_detections=limit)
    assert average_precision(matched)["AP"] == pytest.approx(scored["bbox"]["AP"], abs=1e-9)

    # Counted by hand in what pycocotools matched at IoU 0.5, in objects of all sizes.
    entries = [e for e in expected.evalImgs if e and e["aRng"] == expected.params.areaRng[0]]
    scores = np.concatenate([entry["dtScores"] for entry in entries])
    hits = np.concatenate([entry["dtMatches"][0] > 0 for entry in entries])[scores >= 0.3]
    point = scored["analysis"]["overall"][0]
    assert (point["true_positives"], point["false_positives"]) == (hits.sum(), (~hits).sum())
    worst = scored["analysis"]["worst_images"]
    assert sum(image["misses"] for image in worst) == point["misses"] == 160 - hits.sum()
    # Bees and flies lie apart: here both matchings are the same.
    counts = np.array(scored["analysis"]["confusion_matrix"]["counts"])
    assert np.trace(counts) == hits.sum()
    assert counts[:-1, -1].sum() == point["misses"]


@pytest.mark.parametrize(("per_image", "limit"), [(50, 100), (110, 110), (300, 300)])
def test_what_a_detector_gives_is_not_cut_off(crowded, per_image, limit):
    content, found = crowded
    arguments = {"ground_truth": content, "category_ids": IDS, "detections_per_image": per_image}
    whole = CocoEvaluator(**arguments)
    staged = StageEvaluator(**arguments)
    boxes = [torch.zeros(0, 4)] * 2
    stage = StageOutput(list(found.values()), boxes, boxes)
    output = DetectorOutput(list(found.values()), CascadeStats([], []), [stage])
    for evaluator in (whole, staged):
        evaluator.process([{"image_id": 1}, {"image_id": 2}], output)
    results = whole.evaluate()
    ap = ap_by_pycocotools(content, found, category_ids=IDS, limit=limit)["AP"]
    assert results["bbox"]["AP"] == pytest.approx(ap, abs=1e-9)
    assert staged.evaluate()["stages"]["stage0"]["AP"] == pytest.approx(ap, abs=1e-9)
    told = [note for note in results["notes"] if "TEST.DETECTIONS_PER_IMAGE" in note]
    assert len(told) == (per_image < 140)
    assert all(
        f"1 images have more than {per_image} objects, up to 140 (1.png)" in note for note in told
    )


def test_objects_beyond_the_limit_of_their_class_are_told(crowded):
    truth = load_ground_truth(crowded[0])

    def note(most, image_ids=(1, 2)):
        return too_many_objects_warning(truth, image_ids, most, "--max", of_class=True)

    assert note(120) == note(100, image_ids=[2]) == []
    (told,) = note(119)
    assert told.startswith("1 images have more than 119 objects of a class, up to 120 (1.png)")
    assert told.endswith("Raise --max.")

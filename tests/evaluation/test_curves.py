"""Curves against pycocotools called directly, and against plain loops."""

import math

import numpy as np
import pytest
from noisy_detections import CATEGORY_IDS, random_case, run_pycocotools

from cascade_det.data.coco_results import coco_results
from cascade_det.evaluation import score_results
from cascade_det.evaluation.curves import f1_at
from cascade_det.evaluation.ground_truth import load_ground_truth

HALF = 0.00501  # Two digits are kept.


@pytest.fixture(scope="module", params=[1, 2])
def case(request):
    return random_case(request.param)


def analysis_of(content, found):
    results = [
        row for image_id, one in found.items() for row in coco_results(one, image_id, CATEGORY_IDS)
    ]
    coco_gt = load_ground_truth(content)
    return score_results(coco_gt, results, sorted(coco_gt.imgs))["analysis"]


def test_precision_is_pycocotools(case):
    curves = analysis_of(*case)["curves"]
    precision = 100 * run_pycocotools(*case).eval["precision"][:, :, :, 0, -1]
    assert curves["recalls"] == list(range(101))
    for index, of_class in enumerate(curves["per_class"]):
        assert np.abs(np.array(of_class["precision"]) - precision[0, :, index]).max() <= HALF
    for name, rows in (("AP", slice(None)), ("AP50", slice(0, 1)), ("AP75", slice(5, 6))):
        expected = precision[rows].mean(axis=(0, 2))
        assert np.abs(np.array(curves[f"precision_{name}"]) - expected).max() <= HALF


def test_f1_is_that_of_a_loop_and_none_is_above_the_best(case):
    analysis = analysis_of(*case)
    evaluation = run_pycocotools(*case)
    pairs = zip(analysis["per_class"], analysis["curves"]["per_class"], strict=True)
    for (row, of_class), category_id in zip(pairs, CATEGORY_IDS, strict=True):
        detections, objects = [], 0
        for entry in evaluation.evalImgs:
            if entry and entry["category_id"] == category_id and entry["aRng"] == [0, 1e10]:
                objects += sum(not ignored for ignored in entry["gtIgnore"])
                rows = zip(
                    entry["dtScores"], entry["dtMatches"][0], entry["dtIgnore"][0], strict=True
                )
                detections += [(s, match > 0) for s, match, ignored in rows if not ignored]

        def f1(least, detections=detections, objects=objects):
            kept = [hit for score, hit in detections if score >= least]
            return 200 * sum(kept) / (len(kept) + objects)

        thresholds = analysis["curves"]["scores"]
        assert of_class["F1"] == pytest.approx([f1(t) for t in thresholds], abs=HALF)
        best = max(f1(score) for score, _ in detections)
        assert row["best"]["F1"] == pytest.approx(best)
        assert f1(row["best"]["score"]) == pytest.approx(best)


def test_scores_may_be_any_numbers():
    content, found = random_case(3)
    for one in found.values():
        one.scores.mul_(9).sub_(3)
    curves = analysis_of(content, found)["curves"]
    assert curves["scores"][0] < -1
    assert curves["scores"][-1] > 4
    assert len(curves["scores"]) == len(curves["F1"]) == 101


def test_a_class_without_objects_and_data_without_detections_have_no_curve():
    content, found = random_case(4)
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 7]
    curves = analysis_of(content, found)["curves"]
    assert [bool(one["precision"]) for one in curves["per_class"]] == [True, False, True]
    assert curves["per_class"][1]["F1"] == []
    nothing = analysis_of({**content, "annotations": []}, {})["curves"]
    assert nothing["precision_AP"] == []
    assert all(map(math.isnan, nothing["F1"]))
    assert f1_at(np.zeros(0), np.zeros(0, bool), 2, np.array([0.5])).tolist() == [0.0]

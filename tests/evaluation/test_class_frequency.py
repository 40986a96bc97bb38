"""AP by the frequency of classes, and AP by faster-coco-eval, against pycocotools."""

import copy

import numpy as np
import pytest
from noisy_detections import CATEGORY_IDS, mean_precision, random_case, run_pycocotools
from noisy_masks import mask_evaluation, masked_case, rows_of

from cascade_det.core.structures import CascadeStats, DetectorOutput
from cascade_det.data.coco_results import coco_results
from cascade_det.evaluation import coco_ap
from cascade_det.evaluation.class_frequency import FrequencyEvaluator, frequency_of
from cascade_det.evaluation.ground_truth import load_ground_truth, load_mask_truth

FREQUENCIES = {3: "r", 7: "f", 9: "r"}


def test_frequencies_by_hand():
    assert [frequency_of(n) for n in (0, 1, 10, 11, 100, 101)] == ["r", "r", "r", "c", "c", "f"]


def results_of(found):
    return [row for i, own in found.items() for row in coco_results(own, i, CATEGORY_IDS, None)]


def evaluated(content, found):
    evaluator = FrequencyEvaluator(
        ground_truth=content, category_ids=CATEGORY_IDS, frequencies=FREQUENCIES
    )
    for image_id, own in found.items():
        output = DetectorOutput([own], CascadeStats.empty(3))
        evaluator.process([{"image_id": image_id}], output)
    return evaluator.evaluate()


@pytest.mark.parametrize("seed", range(4))
def test_the_fast_scorer_equals_pycocotools(seed):
    pytest.importorskip("faster_coco_eval")
    content, found = random_case(seed)
    truth, results = load_ground_truth(content), results_of(found)
    for rows in (results, results[:1], []):
        slow, fast = (coco_ap(truth, rows, sorted(truth.imgs), fast=f) for f in (False, True))
        assert fast == pytest.approx(slow, abs=1e-6, nan_ok=True)
        assert list(fast) == list(slow)
    assert truth.dataset["annotations"][0].keys() >= {"area", "iscrowd"}


def test_the_fast_scorer_equals_pycocotools_on_masks():
    pytest.importorskip("faster_coco_eval")
    content, found_in = masked_case(1, num_images=4)
    rows = rows_of(found_in, [category["id"] for category in content["categories"]])
    truth = load_mask_truth(content)
    slow, fast = (
        coco_ap(truth, rows, sorted(truth.imgs), task="segm", fast=f) for f in (False, True)
    )
    assert fast == pytest.approx(slow, abs=1e-6, nan_ok=True)
    wanted = 100 * _mean(mask_evaluation(content, rows).eval["precision"][..., 0, -1])
    assert fast["AP"] == pytest.approx(wanted, abs=1e-6)


def _mean(precision):
    return precision[precision > -1].mean()


@pytest.mark.parametrize("seed", range(3))
def test_classes_are_averaged_by_frequency(seed):
    pytest.importorskip("faster_coco_eval")
    content, found = random_case(seed)
    theirs = run_pycocotools(content, found)
    wanted = {
        "AP": mean_precision(theirs),
        "APr": mean_precision(theirs, category=[0, 2]),
        "APc": float("nan"),
        "APf": mean_precision(theirs, category=1),
    }
    assert evaluated(content, found)["lvis"] == pytest.approx(wanted, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("seed", range(3))
def test_only_annotated_classes_of_an_image_count(seed):
    """Against pycocotools without the detections that LVIS leaves out."""
    pytest.importorskip("faster_coco_eval")
    content, found = random_case(seed)
    rng, left = np.random.default_rng(seed), {}
    federated = copy.deepcopy(content)
    for image in federated["images"]:
        negative = rng.choice(CATEGORY_IDS, rng.integers(0, 3), replace=False).tolist()
        image["neg_category_ids"] = negative
        image["not_exhaustive_category_ids"] = []
        shown = {a["category_id"] for a in content["annotations"] if a["image_id"] == image["id"]}
        own = found[image["id"]]
        allowed = [CATEGORY_IDS[c] in shown | set(negative) for c in own.classes.tolist()]
        left[image["id"]] = own[np.flatnonzero(allowed)]
    theirs = run_pycocotools(content, left)
    ours = evaluated(federated, found)["lvis"]
    assert ours["AP"] == pytest.approx(mean_precision(theirs), abs=1e-6)
    assert ours["APf"] == pytest.approx(mean_precision(theirs, category=1), abs=1e-6)


@pytest.mark.parametrize(("not_exhaustive", "wanted"), [([], 50.0), ([3], 100.0)])
def test_where_not_all_objects_are_marked_a_wrong_detection_does_not_count(
    coco_content, detections, not_exhaustive, wanted
):
    """A detection with a higher score hits nothing: it halves the precision, or is left out."""
    pytest.importorskip("faster_coco_eval")
    content = coco_content([(1, 3, (10, 20, 50, 50))])
    for image in content["images"]:
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": not_exhaustive}
    found = detections(((200, 200, 60, 60), 0.9, 0), ((10, 20, 50, 50), 0.8, 0))
    assert evaluated_of(content, found)["lvis"]["AP"] == pytest.approx(wanted, abs=0.01)


def evaluated_of(content, found):
    evaluator = FrequencyEvaluator(
        ground_truth=content, category_ids=(3, 7), frequencies={3: "c", 7: "c"}
    )
    evaluator.process([{"image_id": 1}], DetectorOutput([found], CascadeStats.empty(3)))
    return evaluator.evaluate()

"""Two evaluations side by side, against pycocotools and the matcher of calibrations."""

import numpy as np
import pytest
from noisy_detections import CATEGORY_IDS, ap_by_pycocotools, random_case
from page_dom import Page
from recorded_trials import match_images
from reported_runs import HOSTILE, make_data, noisy_results, write_run

from cascade_det.calibration.bootstrap import average_precision, paired_bootstrap
from cascade_det.calibration.run_comparison import compare_evaluations, matched_by
from cascade_det.calibration.run_comparison_page import write_comparison_page
from cascade_det.data.coco_results import coco_results
from cascade_det.evaluation.average_precision import ap_metrics, ap_per_class, run_cocoeval
from cascade_det.evaluation.ground_truth import load_ground_truth


def evaluated(content, found):
    rows = [
        row for image_id, one in found.items() for row in coco_results(one, image_id, CATEGORY_IDS)
    ]
    coco_gt = load_ground_truth(content)
    return run_cocoeval(coco_gt, rows, sorted(coco_gt.imgs))


@pytest.mark.parametrize("seed", range(4))
def test_matches_are_those_of_the_matcher(seed):
    content, found = random_case(seed)
    ours = matched_by(evaluated(content, found))
    theirs = match_images(content, CATEGORY_IDS, found)
    for name in ("image_ids", "images", "classes", "hits", "ignored", "objects"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    np.testing.assert_allclose(ours.scores, theirs.scores)
    assert average_precision(ours) == pytest.approx(ap_by_pycocotools(content, found))


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_ap_of_objects_of_one_size_is_that_of_pycocotools(size):
    content, found = random_case(3)
    for number, annotation in enumerate(content["annotations"]):  # sizes that differ
        annotation["area"] = (500, 5000, 50000)[number % 3]
    evaluation = evaluated(content, found)
    ap = average_precision(matched_by(evaluation, size=size))["AP"]
    assert 0 < ap == pytest.approx(ap_metrics(evaluation)[f"AP{size[0]}"])


def test_without_objects_of_a_size_there_is_no_difference():
    content, found = random_case(3)
    for annotation in content["annotations"]:
        annotation["area"] = 50000
    matched = matched_by(evaluated(content, found), size="small")
    difference = paired_bootstrap(matched, matched)["AP"]
    assert np.isnan([difference.value, difference.low, difference.high]).all()


def test_differences_are_of_pycocotools_and_of_the_bootstrap():
    content, found = random_case(5)
    _, worse = random_case(5, noise=6.0)
    a, b = evaluated(content, found), evaluated(content, worse)
    compared = compare_evaluations(a, b)
    expected = ap_by_pycocotools(content, found), ap_by_pycocotools(content, worse)
    pair = (match_images(content, CATEGORY_IDS, one) for one in (found, worse))
    intervals = paired_bootstrap(*pair)
    for name, metric in compared.overall.items():
        assert (metric.a, metric.b) == pytest.approx((expected[0][name], expected[1][name]))
        assert metric.difference.value == pytest.approx(metric.b - metric.a)
        assert metric.difference.low == pytest.approx(intervals[name].low)
        assert metric.difference.low <= metric.difference.value <= metric.difference.high
    for one, category_id in zip(compared.per_class, CATEGORY_IDS, strict=True):
        for name in ("AP", "AP50", "AP75"):
            assert one.metrics[name].a == pytest.approx(ap_per_class(a)[category_id][name])
            assert one.metrics[name].b == pytest.approx(ap_per_class(b)[category_id][name])
    assert compared.overall["AP"].difference.high < 0


def test_nothing_detected_and_a_class_without_objects():
    content, found = random_case(6)
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 7]
    compared = compare_evaluations(evaluated(content, found), evaluated(content, {}))
    assert [one.label for one in compared.per_class] == ["3", "9"]
    assert compared.overall["AP"].b == 0
    assert compared.overall["AP"].a > 3


def test_the_page_has_the_numbers_and_no_way_out(tmp_path):
    content = make_data(tmp_path / "data", HOSTILE)
    results, evaluations = [], []
    coco_gt = load_ground_truth(content)
    for seed, config in ((1, {"A.B": [1, 2]}), (2, {"A.C": ["", HOSTILE[0]]})):
        found = noisy_results(content, seed=seed)
        folder = tmp_path / str(seed)
        results.append(write_run(folder, tmp_path / "data", content, found, config=config))
        evaluations.append(run_cocoeval(coco_gt, found, sorted(coco_gt.imgs)))
    compared = compare_evaluations(*evaluations)
    path = tmp_path / "page.html"
    write_comparison_page(path, [HOSTILE[0], HOSTILE[1]], results, {"bbox": compared})
    page = Page(path.read_text(encoding="utf-8"))
    page.assert_inert()
    ap = compared.overall["AP"]
    (row,) = (row for row in page.rows if row[:1] == ["AP"] and len(row) == 4)
    change = ap.difference
    interval = f"{change.value:+.2f} [{change.low:+.2f}, {change.high:+.2f}]"
    assert row[1:] == [f"{ap.a:.2f}", f"{ap.b:.2f}", interval]
    assert ["tiles of the finest map computed", "0.25", "0.25"] in page.rows
    assert ["A.B", "2", "1"] in page.rows
    assert ["A.C", HOSTILE[0], ""] in page.rows or ["A.C", "", HOSTILE[0]] in page.rows

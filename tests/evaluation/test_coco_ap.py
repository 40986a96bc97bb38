"""COCO AP against cases worked out by hand and against pycocotools called directly."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from noisy_detections import ROWS, mean_precision, random_case, run_pycocotools

from cascade_det.data.coco_results import coco_results
from cascade_det.errors import DatasetError
from cascade_det.evaluation import CocoEvaluator, coco_ap
from cascade_det.evaluation.ground_truth import load_ground_truth

CATEGORY_IDS = (3, 7)
MEDIUM_BOX = (10, 20, 50, 50)
LARGE_BOX = (100, 100, 120, 110)


def make_evaluator(content, **kwargs):
    return CocoEvaluator(ground_truth=content, category_ids=CATEGORY_IDS, **kwargs)


def evaluate(content, detections_of_images, detector_output, **kwargs):
    evaluator = make_evaluator(content, **kwargs)
    for image_id, found in detections_of_images.items():
        evaluator.process([{"image_id": image_id}], detector_output([found]))
    return evaluator.evaluate()


def test_perfect_predictions_have_an_ap_of_100(coco_content, detections, detector_output):
    content = coco_content([(1, 3, MEDIUM_BOX), (1, 7, LARGE_BOX), (2, 3, LARGE_BOX)])
    results = evaluate(
        content,
        {
            1: detections((MEDIUM_BOX, 0.9, 0), (LARGE_BOX, 0.8, 1)),
            2: detections((LARGE_BOX, 1, 0)),
        },
        detector_output,
    )
    assert math.isnan(results["bbox"]["APs"])
    for name in ("AP", "AP50", "AP75", "AP90", "APm", "APl", "AP-cat", "AP-dog"):
        assert results["bbox"][name] == pytest.approx(100), name


def test_one_of_two_objects_found(coco_content, detections, detector_output):
    # Precision is 1 up to a recall of 0.5: that is 51 of the 101 recall values 0, 0.01, ..., 1.
    content = coco_content([(1, 3, MEDIUM_BOX), (2, 3, MEDIUM_BOX)])
    found = {1: detections((MEDIUM_BOX, 0.9, 0)), 2: detections()}
    results = evaluate(content, found, detector_output)
    assert results["bbox"]["AP"] == pytest.approx(100 * 51 / 101)
    assert results["notes"] == [
        "APs is nan: the ground truth has no small object (up to 32 x 32 px).",
        "APl is nan: the ground truth has no large object (from 96 x 96 px).",
        "AP is nan for classes without ground truth: dog.",
    ]


def test_iou_decides_which_thresholds_are_passed(coco_content, detections, detector_output):
    # 100 x 100 against its left 72 columns: IoU 0.72 passes 0.50, 0.55, 0.60, 0.65 and 0.70.
    content = coco_content([(1, 3, (0, 0, 100, 100))], image_ids=(1,))
    bbox = evaluate(content, {1: detections(((0, 0, 72, 100), 0.9, 0))}, detector_output)["bbox"]
    assert (bbox["AP"], bbox["AP50"], bbox["AP75"]) == pytest.approx((50, 100, 0))
    for width, ap90 in ((89, 0), (90, 100)):
        found = {1: detections(((0, 0, width, 100), 0.9, 0))}
        assert evaluate(content, found, detector_output)["bbox"]["AP90"] == pytest.approx(ap90)


def test_the_object_with_id_0_can_be_found(coco_content, detections, detector_output):
    # pycocotools takes the id of the matched object for "was matched", so it misses id 0.
    content = coco_content([(1, 3, MEDIUM_BOX)], image_ids=(1,))
    assert content["annotations"][0]["id"] == 0
    found = {1: detections((MEDIUM_BOX, 0.9, 0))}
    assert evaluate(content, found, detector_output)["bbox"]["AP"] == pytest.approx(100)


def test_missing_area_and_crowd_flag_are_filled_in(coco_content, detections, detector_output):
    content = coco_content([(1, 3, MEDIUM_BOX)], image_ids=(1,))
    for name in ("id", "area", "iscrowd"):
        del content["annotations"][0][name]
    bbox = evaluate(content, {1: detections((MEDIUM_BOX, 0.9, 0))}, detector_output)["bbox"]
    assert bbox["APm"] == pytest.approx(100)


@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_those_of_pycocotools(detector_output, seed):
    content, found = random_case(seed, num_images=6, noise=4.0)
    evaluator = CocoEvaluator(
        ground_truth=content,
        category_ids=[item["id"] for item in content["categories"]],
    )
    for image_id, item in found.items():
        evaluator.process([{"image_id": image_id}], detector_output([item]))
    bbox = evaluator.evaluate()["bbox"]
    expected = run_pycocotools(content, found)
    assert 0.1 < bbox["AP"] < 99
    wanted = {name: mean_precision(expected, row) for name, row in ROWS.items()}
    for area, name in enumerate(("APs", "APm", "APl"), start=1):
        wanted[name] = mean_precision(expected, area=area)
    for category, item in enumerate(content["categories"]):
        wanted[f"AP-{item['name']}"] = mean_precision(expected, category=category)
    assert list(bbox) == list(wanted)
    assert bbox == pytest.approx(wanted, abs=1e-9, nan_ok=True)
    assert expected.params.iouThrs[8] == pytest.approx(0.9)


def test_images_that_were_not_processed_count_as_missed(coco_content, detections, detector_output):
    content = coco_content([(1, 3, MEDIUM_BOX), (2, 3, MEDIUM_BOX)])
    results = evaluate(content, {1: detections((MEDIUM_BOX, 0.9, 0))}, detector_output)
    assert results["bbox"]["AP"] == pytest.approx(100 * 51 / 101)
    assert results["notes"][0].startswith("1 images of the json were not processed (ids 2)")


def test_coco_ap_changes_neither_the_detections_nor_its_answer(coco_content, detections):
    truth = load_ground_truth(coco_content([(1, 3, MEDIUM_BOX)]))
    results = coco_results(detections((MEDIUM_BOX, 0.9, 0)), 1, CATEGORY_IDS)
    before = copy.deepcopy(results)
    first = coco_ap(truth, results, [1, 2])
    assert results == before
    assert first["AP"] == coco_ap(truth, results, [1, 2])["AP"] == pytest.approx(100)


def test_written_file_holds_what_was_evaluated(
    coco_content, detections, detector_output, tmp_path, capsys
):
    content = coco_content([(1, 3, MEDIUM_BOX), (2, 7, LARGE_BOX)])
    found = {1: detections((MEDIUM_BOX, 0.9, 0, 2)), 2: detections((LARGE_BOX, 0.25, 1, 0))}
    evaluate(content, found, detector_output, output_dir=tmp_path / "run")
    folder = tmp_path / "run" / "inference"
    assert [file.name for file in folder.iterdir()] == ["coco_instances_results.json"]
    rows = json.loads((folder / "coco_instances_results.json").read_text())
    assert rows[1] == {
        "image_id": 2,
        "category_id": 7,
        "bbox": [100, 100, 120, 110],
        "score": 0.25,
        "exit_stage": 0,
    }
    assert (rows[0]["category_id"], rows[0]["exit_stage"]) == (3, 2)
    assert rows[0]["score"] == pytest.approx(0.9)
    assert capsys.readouterr().out == ""


def test_neighbouring_scores_stay_apart(detections):
    scores = torch.tensor([1.0, 0.0])
    scores[1] = torch.nextafter(scores[0], scores[1])
    found = detections((MEDIUM_BOX, 0, 0), (MEDIUM_BOX, 0, 0))
    found.scores = scores
    first, second = coco_results(found, 1, CATEGORY_IDS)
    assert first["score"] > second["score"]


def test_reset_forgets(coco_content, detections, detector_output):
    evaluator = make_evaluator(coco_content([(1, 3, MEDIUM_BOX)], image_ids=(1,)))
    wrong = detector_output([detections(((200, 200, 50, 50), 0.9, 0))])
    right = detector_output([detections((MEDIUM_BOX, 0.9, 0))])
    evaluator.process([{"image_id": 1}], wrong)
    evaluator.reset()
    evaluator.process([{"image_id": 1}], right)
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_same_image_twice_is_refused(coco_content, detections, detector_output):
    evaluator = make_evaluator(coco_content([(1, 3, MEDIUM_BOX)]))
    evaluator.process([{"image_id": 1}], detector_output([detections()]))
    with pytest.raises(DatasetError, match=r"image 1 .*twice"):
        evaluator.process([{"image_id": 1}], detector_output([detections()]))


def test_foreign_image_is_refused(coco_content, detections, detector_output):
    evaluator = make_evaluator(coco_content([(1, 3, MEDIUM_BOX)]))
    with pytest.raises(DatasetError, match=r"image 99 \(a.jpg\) is not in the annotation file"):
        evaluator.process([{"image_id": 99, "file_name": "a.jpg"}], detector_output([detections()]))


def test_class_without_category_is_refused(coco_content, detections, detector_output):
    evaluator = make_evaluator(coco_content([(1, 3, MEDIUM_BOX)]))
    found = detections((MEDIUM_BOX, 0.9, 2))
    with pytest.raises(DatasetError, match="NUM_CLASSES to 2"):
        evaluator.process([{"image_id": 1}], detector_output([found]))


def test_outputs_must_be_as_many_as_images(coco_content, detector_output):
    evaluator = make_evaluator(coco_content([(1, 3, MEDIUM_BOX)]))
    with pytest.raises(ValueError, match="1 images but 0"):
        evaluator.process([{"image_id": 1}], detector_output([]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": []}, "not COCO format"),
        ({"images": [], "categories": [], "annotations": [{"bbox": [1]}]}, "annotation 1 .* needs"),
    ],
)
def test_unusable_ground_truth_is_refused(content, message):
    with pytest.raises(DatasetError, match=message):
        load_ground_truth(content)


def test_ground_truth_stays_as_it_was(coco_content, detections, detector_output):
    content = coco_content([(1, 3, MEDIUM_BOX), (1, 7, LARGE_BOX, 1)])
    del content["annotations"][0]["area"]
    before = copy.deepcopy(content)
    evaluate(content, {1: detections((MEDIUM_BOX, 0.9, 0))}, detector_output)
    assert content == before


def test_file_without_annotations_only_collects(
    coco_content, detections, detector_output, tmp_path
):
    content = coco_content([])
    del content["annotations"]
    found = {1: detections((MEDIUM_BOX, 0.9, 0)), 2: detections()}
    results = evaluate(content, found, detector_output, output_dir=tmp_path)
    assert results["bbox"] == {}
    assert "no annotations" in results["notes"][0]
    assert (tmp_path / "inference" / "coco_instances_results.json").exists()

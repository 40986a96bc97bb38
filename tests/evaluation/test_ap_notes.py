"""The sentences that say why an AP is 0 or nan."""

from __future__ import annotations

import logging
import math

import pytest

from cascade_det.evaluation import CocoEvaluator, coco_ap, explain
from cascade_det.evaluation.ground_truth import load_ground_truth

BOX = (10, 20, 50, 50)


def notes_for(content, rows, image_ids=(1, 2)):
    truth = load_ground_truth(content)
    predictions = [
        {"image_id": image_id, "category_id": category, "bbox": list(box), "score": 0.9 - k / 1000}
        for k, (image_id, category, box) in enumerate(rows)
    ]
    figures = coco_ap(truth, predictions, image_ids)
    return figures, "\n".join(explain(figures, truth, predictions, image_ids))


@pytest.fixture
def all_sizes():
    """Objects of both classes and every size, so that nothing is nan."""
    sizes = ((0, 0, 20, 20), BOX, (100, 100, 120, 110))
    return [(1, category, box) for category in (3, 7) for box in sizes]


def test_nothing_to_explain(coco_content, all_sizes):
    figures, notes = notes_for(coco_content(all_sizes), all_sizes)
    assert figures["AP"] == pytest.approx(100)
    assert notes == ""


def test_no_detections(coco_content, all_sizes):
    figures, notes = notes_for(coco_content(all_sizes), [])
    assert figures["AP"] == figures["APs"] == figures["AP-dog"] == 0
    assert notes.startswith("AP is 0: there are no detections at all")
    assert "SCORE_THRESH_TEST" in notes


@pytest.mark.parametrize(
    ("key", "size", "box"),
    [("APs", "small", (0, 0, 32, 31)), ("APm", "medium", BOX), ("APl", "large", (0, 0, 99, 99))],
)
def test_missing_size(coco_content, all_sizes, key, size, box):
    def size_of(item):
        area = item[2] * item[3]
        return "APs" if area < 32**2 else "APm" if area < 96**2 else "APl"

    objects = [item for item in all_sizes if size_of(item[2]) != size_of(box)]
    figures, notes = notes_for(coco_content(objects), objects)
    assert math.isnan(figures[key])
    assert f"{key} is nan: the ground truth has no {size}" in notes
    assert len(notes.splitlines()) == 1


def test_class_without_ground_truth(coco_content, all_sizes):
    objects = [item for item in all_sizes if item[1] == 3]
    figures, notes = notes_for(coco_content(objects), all_sizes)
    assert math.isnan(figures["AP-dog"])
    assert notes == "AP is nan for classes without ground truth: dog."


def test_only_crowds(coco_content):
    figures, notes = notes_for(coco_content([(1, 3, BOX, 1)]), [(1, 3, BOX)])
    assert math.isnan(figures["AP"])
    assert notes.startswith("Every AP is nan: the 2 images evaluated have no ground truth")


def test_ground_truth_of_other_images_does_not_count(coco_content, all_sizes):
    _, notes = notes_for(coco_content(all_sizes), all_sizes, image_ids=(2,))
    assert notes.startswith("Every AP is nan: the 1 images")


def test_category_ids_of_another_data_set(coco_content, all_sizes):
    rows = [(1, category + 100, box) for _, category, box in all_sizes]
    figures, notes = notes_for(coco_content(all_sizes), rows)
    assert figures["AP"] == 0
    assert "6 of 6 detections have category ids that the json does not define (103, 107" in notes
    assert "it defines 3, 7" in notes


def test_detections_in_the_wrong_place(coco_content, all_sizes):
    # Half the scale, as when the boxes are in pixels of a resized image.
    objects = [(1, category, (200, 200, 80, 80)) for category in (3, 7)]
    rows = [(1, category, (100, 100, 40, 40)) for category in (3, 7)]
    figures, notes = notes_for(coco_content(objects), rows)
    assert figures["AP50"] == 0
    assert "none of the 2 detections overlaps an object by IoU 0.5 (the best reaches 0.00)" in notes


def test_best_overlap_is_stated(coco_content):
    # 40 of 100 columns.
    _, notes = notes_for(coco_content([(1, 3, (0, 0, 100, 50))]), [(1, 3, (0, 0, 40, 50))])
    assert "(the best reaches 0.40)" in notes


def test_swapped_classes(coco_content):
    cat, dog = (0, 0, 50, 50), (200, 100, 60, 60)
    objects = [(1, 3, cat), (1, 7, dog)]
    rows = [(1, 7, cat), (1, 3, dog)]
    _, notes = notes_for(coco_content(objects), rows)
    assert "detections overlap objects (IoU up to 1.00), but never one of their own class" in notes


def test_class_that_is_never_predicted(coco_content, all_sizes):
    rows = [item for item in all_sizes if item[1] == 3]
    figures, notes = notes_for(coco_content(all_sizes), rows)
    assert (figures["AP-cat"], figures["AP-dog"]) == pytest.approx((100, 0))
    assert notes == "AP is 0 for classes that were never predicted: dog."


def test_evaluator_logs_and_returns_the_notes(coco_content, detections, detector_output, caplog):
    evaluator = CocoEvaluator(
        ground_truth=coco_content([(1, 3, BOX)], image_ids=(1,)),
        class_names=("cat", "dog"),
        category_ids=(3, 7),
    )
    evaluator.process([{"image_id": 1}], detector_output([detections()]))
    with caplog.at_level(logging.WARNING):
        results = evaluator.evaluate()
    assert results["bbox"]["AP"] == 0
    assert [record.getMessage() for record in caplog.records] == results["notes"]
    assert any("no detections at all" in note for note in results["notes"])

"""The sentences that say why an AP is 0 or nan."""

from __future__ import annotations

import logging
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_det.evaluation import CocoEvaluator, coco_ap, explain
from cascade_det.evaluation.ground_truth import class_labels, load_ground_truth

BOX = (10, 20, 50, 50)


def warnings_for(content, rows, image_ids=(1, 2)):
    truth = load_ground_truth(content)
    predictions = [
        {"image_id": image_id, "category_id": category, "bbox": list(box), "score": 0.9 - k / 1000}
        for k, (image_id, category, box) in enumerate(rows)
    ]
    metrics = coco_ap(truth, predictions, image_ids)
    return metrics, "\n".join(explain(metrics, truth, predictions, image_ids))


@pytest.fixture
def all_sizes():
    """Objects of both classes and every size, so that nothing is nan."""
    sizes = ((0, 0, 20, 20), BOX, (100, 100, 120, 110))
    return [(1, category, box) for category in (3, 7) for box in sizes]


def test_nothing_to_explain(coco_content, all_sizes):
    metrics, warnings = warnings_for(coco_content(all_sizes), all_sizes)
    assert metrics["AP"] == pytest.approx(100)
    assert warnings == ""


def test_no_detections(coco_content, all_sizes):
    metrics, warnings = warnings_for(coco_content(all_sizes), [])
    assert metrics["AP"] == metrics["APs"] == metrics["AP-dog"] == 0
    assert warnings.startswith("AP is 0: there are no detections at all")
    assert "SCORE_THRESH_TEST" in warnings


@pytest.mark.parametrize(
    ("key", "size", "box"),
    [("APs", "small", (0, 0, 32, 31)), ("APm", "medium", BOX), ("APl", "large", (0, 0, 99, 99))],
)
def test_missing_size(coco_content, all_sizes, key, size, box):
    def size_of(item):
        area = item[2] * item[3]
        return "APs" if area < 32**2 else "APm" if area < 96**2 else "APl"

    objects = [item for item in all_sizes if size_of(item[2]) != size_of(box)]
    metrics, warnings = warnings_for(coco_content(objects), objects)
    assert math.isnan(metrics[key])
    assert f"{key} is nan: the ground truth has no {size}" in warnings
    assert len(warnings.splitlines()) == 1


def test_class_without_ground_truth(coco_content, all_sizes):
    objects = [item for item in all_sizes if item[1] == 3]
    metrics, warnings = warnings_for(coco_content(objects), all_sizes)
    assert math.isnan(metrics["AP-dog"])
    assert warnings == "AP is nan for classes without ground truth: dog."


def test_only_crowds(coco_content):
    metrics, warnings = warnings_for(coco_content([(1, 3, BOX, 1)]), [(1, 3, BOX)])
    assert math.isnan(metrics["AP"])
    assert warnings.startswith("Every AP is nan: the 2 images evaluated have no ground truth")


def test_ground_truth_of_other_images_does_not_count(coco_content, all_sizes):
    _, warnings = warnings_for(coco_content(all_sizes), all_sizes, image_ids=(2,))
    assert warnings.startswith("Every AP is nan: the 1 images")


def test_category_ids_of_another_data_set(coco_content, all_sizes):
    rows = [(1, category + 100, box) for _, category, box in all_sizes]
    metrics, warnings = warnings_for(coco_content(all_sizes), rows)
    assert metrics["AP"] == 0
    assert "6 of 6 detections have category ids that the json does not define (103, 107" in warnings
    assert "it defines 3, 7" in warnings


def test_detections_in_the_wrong_place(coco_content, all_sizes):
    # Half the scale, as when the boxes are in pixels of a resized image.
    objects = [(1, category, (200, 200, 80, 80)) for category in (3, 7)]
    rows = [(1, category, (100, 100, 40, 40)) for category in (3, 7)]
    metrics, warnings = warnings_for(coco_content(objects), rows)
    assert metrics["AP50"] == 0
    assert (
        "none of the 2 detections overlaps an object by IoU 0.5 (the best reaches 0.00)" in warnings
    )


def test_best_overlap_is_stated(coco_content):
    # 40 of 100 columns.
    _, warnings = warnings_for(coco_content([(1, 3, (0, 0, 100, 50))]), [(1, 3, (0, 0, 40, 50))])
    assert "(the best reaches 0.40)" in warnings


def test_swapped_classes(coco_content):
    cat, dog = (0, 0, 50, 50), (200, 100, 60, 60)
    objects = [(1, 3, cat), (1, 7, dog)]
    rows = [(1, 7, cat), (1, 3, dog)]
    _, warnings = warnings_for(coco_content(objects), rows)
    assert "detections overlap objects (IoU up to 1.00), but none of their own class" in warnings


def test_class_that_is_never_predicted(coco_content, all_sizes):
    rows = [item for item in all_sizes if item[1] == 3]
    metrics, warnings = warnings_for(coco_content(all_sizes), rows)
    assert (metrics["AP-cat"], metrics["AP-dog"]) == pytest.approx((100, 0))
    assert warnings == "AP is 0 for classes that were never predicted: dog."


def test_evaluator_logs_and_returns_the_notes(coco_content, detections, detector_output, caplog):
    evaluator = CocoEvaluator(
        ground_truth=coco_content([(1, 3, BOX)], image_ids=(1,)),
        category_ids=(3, 7),
    )
    evaluator.process([{"image_id": 1}], detector_output([detections()]))
    with caplog.at_level(logging.WARNING):
        results = evaluator.evaluate()
    assert results["bbox"]["AP"] == 0
    assert [record.getMessage() for record in caplog.records] == results["notes"]
    assert any("no detections at all" in note for note in results["notes"])


def with_areas(content, areas):
    for item, area in zip(content["annotations"], areas, strict=True):
        item["area"] = area
    return content


@pytest.mark.parametrize(
    ("areas", "words"),
    [
        ([0] * 6, "'area' is 0 for all objects, but their boxes have 400 to 13,200 square pixels"),
        ([5000.0] * 6, "'area' is 5000 for all objects"),
        # Shares of the image.
        ([0.003, 0.02, 0.1, 0.003, 0.02, 0.11], "'area' of 6 of 6 objects does not fit"),
        (
            [400, 2500, 13200, 400, 0, 13200],
            "1 of 6 objects does not fit their boxes (one of 2,500",
        ),
        ([400, 2500, 13200, 400, 2500, 10**6], "(one of 13,200 square pixels has 1e+06)"),
    ],
)
def test_areas_that_cannot_be(coco_content, all_sizes, areas, words):
    metrics, warnings = warnings_for(with_areas(coco_content(all_sizes), areas), all_sizes)
    assert words in warnings
    assert warnings.count("APs, APm and APl") == 1
    # That there is no object of some size would be the wrong reason.
    assert "is nan" not in warnings
    assert metrics["AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    "areas",
    [
        [40, 250, 1320, 100, 900, 9000],  # masks
        [21 * 21, 51 * 51, 121 * 111] * 2,  # both edges of a box are pixels of it
        [None] * 6,
    ],
)
def test_areas_that_can_be(coco_content, all_sizes, areas):
    content = with_areas(coco_content(all_sizes), areas)
    if areas[0] is None:
        for item in content["annotations"]:
            del item["area"]
    _, warnings = warnings_for(content, all_sizes)
    assert "'area'" not in warnings


def test_boxes_of_one_size_may_have_one_area(coco_content):
    objects = [(1, 3, BOX), (2, 3, BOX)]
    _, warnings = warnings_for(coco_content(objects), objects)
    assert "'area'" not in warnings
    assert "APs is nan" in warnings


def test_scores_that_rank_nothing(coco_content):
    truth = load_ground_truth(coco_content([(1, 3, BOX), (2, 3, BOX)]))
    rows = [
        {"image_id": image, "category_id": 3, "bbox": list(box), "score": 1.0}
        for image, box in ((1, BOX), (1, (200, 10, 40, 40)), (2, BOX))
    ]
    first, second = coco_ap(truth, rows, [1, 2]), coco_ap(truth, rows[1:] + rows[:1], [1, 2])
    assert first["AP"] != second["AP"]
    words = "All detections of a class have the same score (such as 1)"
    assert words in "\n".join(explain(first, truth, rows, [1, 2]))
    # One score for each class is no better.
    other = {**rows[0], "category_id": 7, "score": 0.5}
    assert words in "\n".join(explain(first, truth, [*rows, other], [1, 2]))
    for changed in ([rows[0]], [*rows, {**rows[0], "score": 0.9}], []):
        assert words not in "\n".join(explain(first, truth, changed, [1, 2]))


def test_categories_of_one_name(coco_content, all_sizes):
    content = coco_content(all_sizes)
    content["categories"][1]["name"] = "cat"
    rows = [item for item in all_sizes if item[1] == 3]
    metrics, warnings = warnings_for(content, rows)
    assert (metrics["AP-cat (id 3)"], metrics["AP-cat (id 7)"]) == pytest.approx((100, 0))
    first, second = warnings.splitlines()
    assert "the same name" in first
    assert first.endswith("cat (id 3), cat (id 7).")
    assert second == "AP is 0 for classes that were never predicted: cat (id 7)."


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["a", "b", "a (id 1)", "a (id 2)", "a (id 2) (id 2)"]), min_size=1))
def test_labels_differ_and_names_that_are_alone_stay(names):
    labels = class_labels({key: {"name": name} for key, name in enumerate(names)})
    assert list(labels) == list(range(len(names)))
    assert len(set(labels.values())) == len(names)
    assert all(labels[key].startswith(name) for key, name in enumerate(names))
    if "b" in names and names.count("b") == 1:
        assert labels[names.index("b")] == "b"


def test_names_in_notes_can_be_shown(coco_content, all_sizes):
    content = coco_content([item for item in all_sizes if item[1] == 3])
    content["categories"][1]["name"] = "\x1b[2J\u202e" + "x" * 10_000
    _, warnings = warnings_for(content, all_sizes)
    assert "\\x1b[2J\\u202exx" in warnings
    assert len(warnings) < 200


def test_detections_as_corners(coco_content, all_sizes):
    words = "bbox' must be [x, y, width, height]"
    content = coco_content(all_sizes)
    near = [(1, 3, (10, 10, 90, 80)), (1, 7, (50, 50, 140, 100))]
    assert words not in warnings_for(content, near)[1]  # These are boxes either way.
    far = [(i, c, (x + 150, y + 80, x + w + 150, y + h + 80)) for i, c, (x, y, w, h) in all_sizes]
    assert words in warnings_for(content, far)[1]
    assert words not in warnings_for(content, [*far, (1, 3, (50, 50, 40, 40))])[1]
    for image in content["images"]:
        del image["width"]
    assert words not in warnings_for(content, far)[1]

"""Precision, recall, confusions and worst images against plain loops and hand-made cases."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_det.evaluation import score_results
from cascade_det.evaluation.confusion import confusion_matrix
from cascade_det.evaluation.ground_truth import load_ground_truth

CATEGORY_IDS = (3, 7)
IMAGE_IDS = (1, 2)
CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
BOX, FAR = [10, 20, 50, 50], [200, 100, 60, 60]


def truth(*objects):
    """Ground truth of (image id, category id, XYWH box[, iscrowd])."""
    images = [{"id": image_id, "file_name": f"{image_id}.jpg"} for image_id in IMAGE_IDS]
    annotations = [
        {"image_id": i, "category_id": c, "bbox": b, "iscrowd": crowd[0] if crowd else 0}
        for i, c, b, *crowd in objects
    ]
    return load_ground_truth(
        {"images": images, "categories": CATEGORIES, "annotations": annotations}
    )


def found(*detections):
    """Results of (image id, category id, XYWH box, score)."""
    return [
        {"image_id": i, "category_id": c, "bbox": b, "score": score}
        for i, c, b, score in detections
    ]


def analysis(coco_gt, results, **kwargs):
    return score_results(coco_gt, results, IMAGE_IDS, **kwargs)["analysis"]


# A coarse grid, so that boxes coincide, overlap, and reach an IoU of just 0.5 often.
boxes = st.tuples(
    st.sampled_from([0, 10, 20, 40]), st.sampled_from([0, 10]),
    st.sampled_from([10, 20, 40]), st.sampled_from([10, 20]),
).map(list)  # fmt: skip
places = (st.sampled_from(IMAGE_IDS), st.sampled_from(CATEGORY_IDS), boxes)
object_lists = st.lists(st.tuples(*places, st.sampled_from([0, 0, 0, 1])), max_size=8)
detection_lists = st.lists(
    st.tuples(*places, st.sampled_from([0.1, 0.3, 0.5, 0.5, 0.7, 0.9])), max_size=10
)


def shared_area(a, b):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height)


def iou(a, b):
    shared = shared_area(a, b)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def covered(detection, crowd):
    return shared_area(detection, crowd) / (detection[2] * detection[3])


def naive_counts(objects, detections, threshold, category):
    """Hits, false positives and misses of a class, matched from scratch at this threshold."""
    hits = wrong = 0
    free = [(i, box) for i, c, box, crowd in objects if c == category and not crowd]
    total = len(free)
    kept = [d for d in detections if d[3] >= threshold and d[1] == category]
    for image_id, _, box, _ in sorted(kept, key=lambda d: -d[3]):
        candidates = [item for item in free if item[0] == image_id and iou(item[1], box) >= 0.5]
        if candidates:
            # pycocotools keeps the last one of equals.
            best = max(iou(item[1], box) for item in candidates)
            chosen = [n for n, item in enumerate(free) if item in candidates
                      and iou(item[1], box) == best][-1]  # fmt: skip
            del free[chosen]
            hits += 1
        elif not any(
            crowd and i == image_id and c == category and covered(box, b) >= 0.5
            for i, c, b, crowd in objects
        ):
            wrong += 1
    return hits, wrong, total - hits


def shares(hits, wrong, misses):
    """Precision, recall and F1 in percent."""
    nan = float("nan")
    precision = 100 * hits / (hits + wrong) if hits + wrong else nan
    recall = 100 * hits / (hits + misses) if hits + misses else nan
    f1 = 200 * hits / (2 * hits + wrong + misses) if hits + wrong + misses else nan
    return precision, recall, f1


def scalars_of(point):
    return point["true_positives"], point["false_positives"], point["misses"]


def check_point(point, counts):
    assert scalars_of(point) == counts
    ours = (point["precision"], point["recall"], point["F1"])
    assert ours == pytest.approx(shares(*counts), nan_ok=True)


@settings(max_examples=80)
@given(objects=object_lists, detections=detection_lists, threshold=st.sampled_from([0.3, 0.5, 0.8]))
def test_precision_and_recall_equal_a_matching_from_scratch(objects, detections, threshold):
    result = analysis(truth(*objects), found(*detections), score_threshold=threshold)

    def counts(at, categories):
        of_classes = [naive_counts(objects, detections, at, c) for c in categories]
        return tuple(map(sum, zip(*of_classes, strict=True)))

    def best(categories):
        """(F1, score): all thresholds tried."""
        tried = [(shares(*counts(s, categories))[2], s) for s in {d[3] for d in detections}]
        return max(((f1, s) for f1, s in tried if f1 > 0), default=(0, math.nan))

    groups = [(result["overall"], CATEGORY_IDS)]
    groups += [
        ((row, row["best"]), (category,))
        for row, category in zip(result["per_class"], CATEGORY_IDS, strict=True)
    ]
    for (chosen, at_best), categories in groups:
        check_point(chosen, counts(threshold, categories))
        f1, score = best(categories)
        assert at_best["score"] == pytest.approx(score, nan_ok=True)
        if f1:
            check_point(at_best, counts(score, categories))
    assert [row["category_id"] for row in result["per_class"]] == [3, 7]
    assert [row["class"] for row in result["per_class"]] == ["cat", "dog"]
    # Worst images account for every mistake.
    for key in ("false_positives", "misses"):
        assert sum(i[key] for i in result["worst_images"]) == result["overall"][0][key]


def naive_confusion(objects, detections, threshold):
    """Counts by (true class, detected class); ``None`` is background."""
    counts = {}

    def add(true, detected):
        counts[true, detected] = counts.get((true, detected), 0) + 1

    free = [item for item in objects if not item[3]]
    kept = [d for d in detections if d[3] >= threshold]
    for image_id, category, box, _ in sorted(kept, key=lambda d: -d[3]):
        best = None
        for number, (i, c, b, _) in enumerate(free):
            if i == image_id and iou(b, box) >= 0.5:
                key = (iou(b, box), c == category, -number)
                best = key if best is None else max(best, key)
        if best is not None:
            add(free.pop(-best[2])[1], category)
        elif not any(
            i == image_id and c == category and crowd and covered(box, b) >= 0.5
            for i, c, b, crowd in objects
        ):
            add(None, category)
    for _, category, _, _ in free:
        add(category, None)
    return counts


@settings(max_examples=150)
@given(objects=object_lists, detections=detection_lists, threshold=st.sampled_from([0.3, 0.5, 0.8]))
def test_confusions_equal_a_plain_loop(objects, detections, threshold):
    matrix = confusion_matrix(
        truth(*objects), found(*detections), IMAGE_IDS, score_threshold=threshold
    )
    expected = naive_confusion(objects, detections, threshold)
    labels = [*CATEGORY_IDS, None]
    ours = {
        (true, detected): int(matrix[row, column])
        for row, true in enumerate(labels)
        for column, detected in enumerate(labels)
        if matrix[row, column]
    }
    assert ours == expected


def test_a_wrong_class_takes_the_object():
    # The dog is surer than the cat, so the cat is left with nothing.
    results = found((1, 7, BOX, 0.9), (1, 3, BOX, 0.8))
    result = analysis(truth((1, 3, BOX)), results)
    assert result["confusion_matrix"]["classes"] == ["cat", "dog", "background"]
    assert result["confusion_matrix"]["counts"] == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]
    # For AP, classes do not meet.
    assert scalars_of(result["overall"][0]) == (1, 1, 0)


def test_unknown_categories_and_other_images_do_not_count():
    results = found((1, 99, BOX, 0.9), (2, 3, BOX, 0.9))
    coco_gt = truth((1, 3, BOX), (2, 3, BOX))
    assert confusion_matrix(coco_gt, results, [1]).tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert score_results(coco_gt, results, [1])["analysis"]["overall"][0]["misses"] == 1


def test_worst_images_show_every_box_once():
    objects = [(1, 3, BOX), (1, 3, FAR), (2, 7, BOX), (2, 3, FAR, 1)]
    results = found(
        (1, 3, BOX, 0.9), (1, 7, BOX, 0.6), (1, 7, FAR, 0.4), (2, 7, BOX, 0.9), (2, 3, FAR, 0.9)
    )
    result = analysis(truth(*objects), results)
    # Image 2 has no mistake: the crowd and what lies in it do not count.
    [worst] = result["worst_images"]
    assert (worst["image_id"], worst["file_name"]) == (1, "1.jpg")
    assert scalars_of(worst) == (1, 1, 1)
    assert worst["F1"] == pytest.approx(50)
    assert worst["boxes"] == [
        {
            "kind": "found",
            "class": "cat",
            "bbox": BOX,
            "detection": {"class": "cat", "bbox": BOX, "score": 0.9},
        },
        {"kind": "false positive", "class": "dog", "bbox": BOX, "score": 0.6},
        {"kind": "missed", "class": "cat", "bbox": FAR},
    ]


def test_more_mistakes_are_worse_and_then_a_lower_f1():
    one, two, three = ([offset, 0, 20, 20] for offset in (0, 100, 200))
    objects = [(1, 3, one), (1, 3, two), (2, 3, one)]
    results = found((1, 3, one, 0.9))
    assert [i["image_id"] for i in analysis(truth(*objects), results)["worst_images"]] == [2, 1]
    objects.append((1, 3, three))
    assert [i["image_id"] for i in analysis(truth(*objects), results)["worst_images"]] == [1, 2]


def test_one_class_has_metrics_of_its_own():
    content = {
        "images": [{"id": 1}],
        "categories": [{"id": 5, "name": "cell"}],
        "annotations": [{"image_id": 1, "category_id": 5, "bbox": BOX}],
    }
    results = score_results(load_ground_truth(content), found((1, 5, BOX, 0.9)), [1])
    assert results["bbox"]["AP-cell"] == pytest.approx(100)
    [row] = results["analysis"]["per_class"]
    assert (row["class"], row["AP50"], row["AP75"], row["F1"]) == pytest.approx(
        ("cell", 100, 100, 100)
    )


def test_nothing_detected_and_nothing_to_detect():
    result = analysis(truth(), [])
    point, best = result["overall"]
    assert scalars_of(point) == scalars_of(best) == (0, 0, 0)
    assert math.isnan(point["precision"])
    assert math.isnan(point["recall"])
    assert math.isnan(best["score"])
    assert result["worst_images"] == []


def test_only_three_metrics_are_numbers_of_the_analysis_itself():
    # What is nested in lists is not logged during training.
    result = analysis(truth((1, 3, BOX)), found((1, 3, BOX, 0.9)))
    numbers = {name for name, value in result.items() if isinstance(value, float)}
    nested = [value for value in result.values() if isinstance(value, dict)]
    assert numbers == {"precision", "recall", "F1"}
    assert all(isinstance(value, list) for mapping in nested for value in mapping.values())
    # Plain types only; as text, since nan is not equal to itself.
    assert json.dumps(json.loads(json.dumps(result))) == json.dumps(result)

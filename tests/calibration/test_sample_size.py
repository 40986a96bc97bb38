"""What a calibration can show with its images, against exact intervals and pycocotools."""

import logging
import math

import pytest
from scipy.stats import binomtest, norm

from cascade_det.calibration.image_matching import ImageMatcher
from cascade_det.calibration.sample_size import SampleSize, images_to_search
from cascade_det.calibration.target import Target
from cascade_det.errors import DatasetError
from cascade_det.evaluation.average_precision import coco_ap
from cascade_det.evaluation.ground_truth import load_ground_truth

NAMES = ("cat", "dog", "owl")


@pytest.fixture
def told(caplog):
    """``told(sample, target)``: level and text of the log line."""

    def tell(sample, **target):
        caplog.clear()
        with caplog.at_level(logging.INFO, "cascade_det"):
            sample.log(Target(**target))
        (record,) = caplog.records
        return record.levelno, record.getMessage()

    return tell


def counted(*categories_of_images):
    """The sample of images with an object of each of these categories."""
    box = {"bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}
    of_images = dict(enumerate(categories_of_images, start=11))
    content = {
        "images": [{"id": i, "height": 50, "width": 50} for i in of_images],
        "categories": [{"id": c, "name": n} for c, n in zip((5, 7, 9), NAMES, strict=True)],
        "annotations": [
            {**box, "id": 100 * image + i, "image_id": image, "category_id": category}
            for image, categories in of_images.items()
            for i, category in enumerate(categories)
        ],
    }
    return SampleSize.of(list(of_images), ImageMatcher(content, [5, 7, 9]), NAMES)


def test_objects_are_counted():
    sample = counted([5, 5], [5, 9], [9], [5, 9, 9, 9], [])
    assert sample == SampleSize(5, {"cat": 4, "owl": 5})
    assert sample.rarest == "cat"


def test_one_image_with_objects_is_too_few():
    with pytest.raises(DatasetError, match="Only 1 of the 3 images has objects"):
        counted([5, 9], [], [])


def test_one_object_makes_no_more_of_the_ap(told):
    """Perfect detections but for one, by pycocotools."""
    counts = {"cat": 4, "dog": 20, "owl": 10}
    truth = {
        "images": [{"id": 1, "height": 500, "width": 900}],
        "categories": [{"id": i, "name": name} for i, name in enumerate(counts)],
        "annotations": [
            {"image_id": 1, "category_id": i, "bbox": [40 * n, 90 * i, 30, 60], "iscrowd": 0}
            for i, count in enumerate(counts.values())
            for n in range(count)
        ],
    }
    for number, annotation in enumerate(truth["annotations"], start=1):
        annotation.update(id=number, area=1800)
    found = [{**annotation, "score": 0.9} for annotation in truth["annotations"]]
    without = [f for f in found if f["id"] != 1]
    sample = SampleSize(100, counts)
    lost = 100 - coco_ap(load_ground_truth(truth), without, [1])["AP"]
    # 101 recalls are looked at.
    assert sample.step == pytest.approx(lost, abs=0.34)
    assert sample.step >= lost


@pytest.mark.parametrize("images", [2, 15, 400])
def test_what_was_not_seen_may_still_be_there(images):
    exact = binomtest(0, images, alternative="less").proportion_ci(0.95, method="exact")
    assert SampleSize(images, {"cat": 3}).unseen == pytest.approx(exact.high)


def test_few_images_are_a_warning_and_many_are_not(told):
    few, many = SampleSize(15, {"cat": 900}), SampleSize(240, {"cat": 900})
    level, text = told(few, exit_rate=0.5)
    assert level == logging.WARNING
    assert "15 images with 900 objects" in text
    assert "lost on 18 % of images" in text
    assert told(many, exit_rate=0.5)[0] == logging.INFO


def test_a_drop_of_less_than_one_object_is_told_with_how_many_images_it_takes(told):
    sample = SampleSize(400, {"cat": 50, "dog": 500})
    level, text = told(sample, max_ap_drop=0.1)
    assert sample.step == 1.0
    assert level == logging.WARNING
    assert "fewest of cat (50)" in text
    assert "--max-ap-drop 0.1 is less than one object" in text
    assert "4000 or more" in text
    assert told(sample, max_ap_drop=1.0)[0] == logging.INFO
    level, text = told(sample, max_ap_drop=0.0)
    assert level == logging.WARNING
    assert "or more" not in text


def test_a_free_search_takes_as_many_images_as_judge_it():
    """On half of that many images, the bound is a quarter of the limit away."""
    sample, deviation, drop = SampleSize(100, {"cat": 5000, "dog": 5000}), 0.2, 0.5
    needed = images_to_search(sample, deviation, drop)
    on_half = deviation * math.sqrt(100 / (needed / 2))
    assert norm.ppf(0.95) * on_half == pytest.approx(drop / 4, rel=1e-2)
    assert images_to_search(sample, deviation, 2 * drop) == pytest.approx(needed / 4, abs=1)
    # Of rare objects, each counts much, though none of these happened to be lost.
    rare = SampleSize(100, {"cat": 5, "dog": 5000})
    needed = images_to_search(rare, 0.0, drop)
    assert SampleSize(50, {"cat": 5 * needed / 200, "dog": 9999}).step == pytest.approx(drop / 4)
    assert images_to_search(sample, deviation, 0.0) == math.inf
    assert images_to_search(sample, math.nan, drop) == math.inf

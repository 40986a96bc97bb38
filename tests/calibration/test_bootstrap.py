"""Average precision of weighted images, as in pycocotools, and the bootstrap of its differences."""

import math

import numpy as np
import pytest
import torch
from noisy_detections import CATEGORY_IDS, ap_by_pycocotools, content_of, random_case
from recorded_trials import match_images

from cascade_det.calibration.bootstrap import (
    average_precision,
    average_precisions,
    paired_bootstrap,
)
from cascade_det.calibration.image_matching import ImageMatcher, join_images
from cascade_det.core.structures import Detections

BOX = (10, 10, 40, 40)


def weighted_precision(matched, weights):
    """The APs of one set of image weights."""
    metrics = average_precisions(matched, np.asarray(weights)[None])
    return {name: values[0] for name, values in metrics.items()}


def duplicated(content, found, copies):
    """A data set with that many copies of each image, by its place."""
    images, annotations, detections = [], [], {}
    for image, count in zip(content["images"], copies, strict=True):
        for copy in range(count):
            image_id = image["id"] * 100 + copy
            images.append(image_id)
            detections[image_id] = found[image["id"]]
            annotations += [
                {**item, "image_id": image_id}
                for item in content["annotations"]
                if item["image_id"] == image["id"]
            ]
    return content_of(images, annotations), detections


def assert_same(metrics, expected):
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-9, nan_ok=True), name


@pytest.mark.parametrize("seed", range(5))
def test_whole_set_as_in_pycocotools(seed):
    content, found = random_case(seed)
    expected = ap_by_pycocotools(content, found)
    assert 3 < expected["AP90"] < expected["AP"] < 95
    assert_same(average_precision(match_images(content, CATEGORY_IDS, found)), expected)


@pytest.mark.parametrize("seed", range(8))
def test_equal_overlaps_and_scores_as_in_pycocotools(seed):
    content, found = random_case(seed, num_images=4, max_objects=12)
    # On a grid of 10 with sides of 60, many a box lies in the middle between two objects.
    for item in content["annotations"]:
        x, y, _, _ = item["bbox"]
        item["bbox"] = [x % 80 // 10 * 10, y % 30 // 10 * 10, 60, 60]
    rng = np.random.default_rng(seed)
    for item in found.values():
        item.boxes[:, :2] = torch.from_numpy(rng.integers((9, 4), size=(len(item), 2)) * 10.0)
        item.boxes[:, 2:] = item.boxes[:, :2] + 60
        item.scores = (item.scores * 5).round() / 5
    matched = match_images(content, CATEGORY_IDS, found)
    assert len(np.unique(matched.scores)) <= 6
    assert_same(average_precision(matched), ap_by_pycocotools(content, found))


@pytest.mark.parametrize("seed", range(5))
def test_weights_are_copies_of_images(seed):
    content, found = random_case(seed)
    copies = np.random.default_rng(seed).integers(0, 4, len(found))
    metrics = weighted_precision(match_images(content, CATEGORY_IDS, found), copies)
    assert_same(metrics, ap_by_pycocotools(*duplicated(content, found, copies)))


def test_many_sets_of_weights_at_once(monkeypatch):
    # Small chunks, so that there are several, the last of them not full.
    monkeypatch.setattr("cascade_det.calibration.bootstrap.CHUNK_ELEMENTS", 150)
    content, found = random_case(7)
    matched = match_images(content, CATEGORY_IDS, found)
    weights = np.random.default_rng(0).integers(0, 3, (7, len(found)))
    together = average_precisions(matched, weights)
    for index, row in enumerate(weights):
        single = weighted_precision(matched, row)
        assert_same({name: values[index] for name, values in together.items()}, single)


def nothing():
    none = torch.zeros(0, dtype=torch.int64)
    return Detections(torch.zeros(0, 4), torch.zeros(0), none, none)


def test_without_detections_and_without_objects():
    content, found = random_case(1)
    matched = match_images(content, CATEGORY_IDS, dict.fromkeys(found, nothing()))
    assert set(average_precision(matched).values()) == {0.0}
    assert all(map(math.isnan, weighted_precision(matched, np.zeros(len(found))).values()))


def one_object_each(found_in, count=100):
    """One object per image, found perfectly in some images and not at all in the others."""
    annotation = {"category_id": 3, "bbox": list(BOX), "area": 1600, "iscrowd": 0}
    content = content_of(
        range(count), [{**annotation, "id": i + 1, "image_id": i} for i in range(count)]
    )
    zero = torch.zeros(1, dtype=torch.int64)
    hit = Detections(torch.tensor([[10.0, 10.0, 50.0, 50.0]]), torch.ones(1), zero, zero)
    found = {image_id: hit if image_id in found_in else nothing() for image_id in range(count)}
    return match_images(content, CATEGORY_IDS, found)


def test_deviation_of_a_paired_difference():
    # AP is the recall, up to the grid of 101. The second finds 80 objects, the first 60 of them:
    # the difference is the share of 20 images of 100, with deviation sqrt(0.2 * 0.8 / 100). Were
    # the pairs broken, it would be sqrt((0.6 * 0.4 + 0.8 * 0.2) / 100) = 6.3 points.
    first, second = one_object_each(range(60)), one_object_each(range(80))
    for name, difference in paired_bootstrap(first, second, rounds=2000).items():
        assert difference.value == pytest.approx(20, abs=0.3), name
        assert difference.deviation == pytest.approx(4, abs=0.3)
        assert difference.low == pytest.approx(20 - 1.96 * 4, abs=1.1)
        assert difference.high == pytest.approx(20 + 1.96 * 4, abs=1.1)


def test_bootstrap_of_the_same_detections_and_of_the_same_seed():
    content, found = random_case(2)
    other = random_case(2, noise=8.0)[1]
    a, b = (match_images(content, CATEGORY_IDS, item) for item in (found, other))
    same = paired_bootstrap(a, a, rounds=20)["AP"]
    assert (same.value, same.deviation, same.low, same.high) == (0, 0, 0, 0)
    forward = paired_bootstrap(a, b, rounds=50)
    assert forward == paired_bootstrap(a, b, rounds=50)
    assert forward["AP"].value < 0
    assert paired_bootstrap(b, a, rounds=50)["AP"].low == pytest.approx(-forward["AP"].high)


def test_resamples_without_objects_say_nothing():
    # The only object is in one of three images: about (2/3)^3 of the resamples lack it.
    content, found = random_case(0, num_images=3)
    content["annotations"] = [
        {"id": 1, "image_id": 2, "category_id": 3, "bbox": list(BOX), "area": 1600, "iscrowd": 0}
    ]
    matched = match_images(content, CATEGORY_IDS, dict.fromkeys(found, nothing()))
    assert paired_bootstrap(matched, matched, rounds=50)["AP"].high == 0


def test_matches_are_remembered_until_there_are_too_many(monkeypatch):
    monkeypatch.setattr("cascade_det.calibration.image_matching.CACHE_SIZE", 2)
    content, found = random_case(3)
    matcher = ImageMatcher(content, CATEGORY_IDS)
    images = [image_id for image_id, item in found.items() if len(item)][:3]
    first = matcher.match(images[0], found[images[0]])
    assert matcher.match(images[0], found[images[0]][:]) is first
    matcher.match(images[1], found[images[1]])
    assert matcher.match(images[0], found[images[0]]) is first
    matcher.match(images[2], found[images[2]])  # Drops the one that was asked for longest ago.
    assert matcher.match(images[0], found[images[0]]) is first
    matcher.match(images[1], found[images[1]])
    matcher.match(images[2], found[images[2]])
    assert matcher.match(images[0], found[images[0]]) is not first


def test_changed_detections_are_matched_again():
    content, found = random_case(4)
    matcher = ImageMatcher(content, CATEGORY_IDS)
    join_images(matcher.match(*item) for item in found.items())
    changed = {
        image_id: Detections(item.boxes + 5, item.scores, item.classes, item.exit_stages)
        for image_id, item in found.items()
    }
    matched = join_images(matcher.match(*item) for item in changed.items())
    assert_same(average_precision(matched), ap_by_pycocotools(content, changed))


def as_rows(columns):
    return sorted(zip(*(column.tolist() for column in columns), strict=True))


def test_rows_follow_their_detections():
    content, found = random_case(5)
    matched = match_images(content, CATEGORY_IDS, found)
    assert len(matched.scores) == sum(map(len, found.values()))
    for index, image_id in enumerate(matched.image_ids.tolist()):
        rows = matched.images == index
        columns = (matched.scores[rows], matched.classes[rows], matched.exit_stages[rows])
        item = found[image_id]
        expected = (item.scores, item.classes, item.exit_stages)
        assert as_rows(columns) == as_rows(expected)
    assert not (matched.hits & matched.ignored).any()
    assert matched.ignored.any()
    crowds = sum(item["iscrowd"] for item in content["annotations"])
    assert matched.objects.sum() == len(content["annotations"]) - crowds


def test_objects_of_an_image():
    content, _ = random_case(5)
    matcher = ImageMatcher(content, CATEGORY_IDS)
    for image in content["images"]:
        boxes, classes = matcher.objects_of(image["id"])
        assert boxes.shape == (len(classes), 4)
        wanted = [
            (x, y, x + width, y + height, CATEGORY_IDS.index(item["category_id"]))
            for item in content["annotations"]
            for x, y, width, height in [item["bbox"]]
            if item["image_id"] == image["id"] and not item["iscrowd"]
        ]
        assert sorted(map(tuple, np.column_stack([boxes, classes]).tolist())) == sorted(wanted)

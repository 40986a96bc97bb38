"""Data sets whose entries are valid but wrong as a whole; none in real data."""

import logging

import numpy as np
import pytest

from cascade_det.data.catalog import dataset_of_files
from cascade_det.data.coco import load_dataset
from cascade_det.data.coco_json import check_coco_json
from cascade_det.data.warnings import find_mistakes

CORNERS = (
    "box that leaves its image as (x, y, width, height), which COCO's format has: all fit as "
    "(x1, y1, x2, y2)"
)


def boxes_in(generator, count, width=40, height=30):
    """Corners of boxes anywhere in an image, 2 pixels wide and high or more."""
    for _ in range(count):
        x1, y1 = generator.integers(0, [width - 2, height - 2])
        x2, y2 = generator.integers([x1 + 2, y1 + 2], [width + 1, height + 1])
        yield [int(v) for v in (x1, y1, x2, y2)]


def warnings_of(coco, boxes, **write):
    annotations = [coco.box(n, 1, box, **more) for n, (box, more) in enumerate(boxes, 1)]
    source = coco.write([coco.image(1)], annotations, **write)
    return find_mistakes(check_coco_json(source)).counts, source


def test_corners_are_told_from_sides(coco):
    generator = np.random.default_rng(3)
    corners = list(boxes_in(generator, 30))
    leaving = sum(x1 + x2 > 41 or y1 + y2 > 31 for x1, y1, x2, y2 in corners)
    assert leaving > 12
    assert warnings_of(coco, [(box, {}) for box in corners])[0] == {CORNERS: leaving}
    sides = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in corners]
    assert warnings_of(coco, [(box, {}) for box in sides])[0] == {}


@pytest.mark.parametrize(
    "boxes",
    [
        # Boxes that tools let reach over the border, none of which can be corners.
        [[30, 20, 20, 20]] * 10,
        # Large boxes at the upper left: they would do as corners, and stay inside as they are.
        [[2, 3, 36, 26]] * 10,
        [],
    ],
)
def test_other_boxes_are_not_taken_for_corners(coco, boxes):
    assert warnings_of(coco, [(box, {}) for box in boxes])[0] == {}


SIDES = ([1, 1, 4, 4], [1, 1, 20, 25], [5, 5, 10, 10])


@pytest.mark.parametrize(
    ("areas", "expected"),
    [
        ((0, 0, 0), {"'area' that is 0 for all boxes: AP by size is meaningless": 3}),
        ((1.0, 1.0, 1.0), {"'area' that is 1.0 for all boxes: AP by size is meaningless": 3}),
        ((900, 900, 900), {"'area' that is 900 for all boxes: AP by size is meaningless": 3}),
        ((16, 0, 100), {"'area' of 0: the object counts as small in AP by size": 1}),
        ((-1, -1, -1), {"'area' below 0: an evaluation ignores the object": 3}),
        ((16, -1, 100), {"'area' below 0: an evaluation ignores the object": 1}),
        ((16, 500, 100), {}),
        ((9, 300, 60), {}),  # of masks
        ((None, None, None), {}),
    ],
)
def test_useless_areas(coco, areas, expected):
    boxes = [(box, {"area": area}) for box, area in zip(SIDES, areas, strict=True)]
    assert warnings_of(coco, boxes)[0] == expected


def test_boxes_of_one_size_have_one_area(coco):
    assert warnings_of(coco, [([n, n, 10, 12], {"area": 120}) for n in range(9)])[0] == {}
    assert warnings_of(coco, [([n, n, 10, 12], {"area": 70.5}) for n in range(9)])[0] == {}
    assert warnings_of(coco, [([n, n, 10, 12], {"area": 1}) for n in range(9)])[0] != {}
    assert warnings_of(coco, [([1, 1, 10, 12], {"area": 1})])[0] == {}


def test_the_start_of_a_run_tells_them_all(coco, caplog):
    """The check command uses the same code, see its tests."""
    boxes = list(boxes_in(np.random.default_rng(0), 20))
    two = [{"id": 3, "name": "cat"}, {"id": 9, "name": "cat"}]
    _, source = warnings_of(coco, [(box, {"area": 0}) for box in boxes], categories=two)
    with caplog.at_level(logging.WARNING):
        load_dataset(source)
    assert f"{source.json_file}: probably a mistake\n" in caplog.text
    assert f" x {CORNERS}: annotation 1 " in caplog.text
    assert "20 x 'area' that is 0 for all boxes: AP by size is meaningless: ann" in caplog.text
    assert "2 x category that shares its name with another: category 3 ('cat'), category 9" in (
        caplog.text
    )
    caplog.clear()
    load_dataset(source, share=(1, 2), gather=lambda mine: [mine])
    assert not caplog.text  # of several processes the first one says it


def test_real_data_is_not_accused(bccd):
    for split in ("train", "val"):
        json_file = bccd / "annotations" / f"instances_{split}.json"
        source = dataset_of_files(str(json_file), str(bccd / "images"))
        assert not find_mistakes(check_coco_json(source))

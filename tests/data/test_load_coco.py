"""Reading COCO-format json: records of good files, and messages about bad ones."""

import dataclasses
import logging
import os
import re

import numpy as np
import pytest
from PIL import Image

from cascade_det.data.catalog import find_dataset
from cascade_det.data.coco import check_same_classes, load_dataset
from cascade_det.errors import DatasetError

NAN, INF = float("nan"), float("inf")


# -- good files ---------------------------------------------------------------------------------


def test_records_are_what_the_json_says(coco, caplog):
    source = coco.write(
        [coco.image(9, 50, 20), coco.image(2)],
        [
            coco.box(30, 9, (1, 2, 3.5, 4), category_id=7),
            coco.box(10, 9, (0, 0, 50, 20), iscrowd=1),
        ],
    )
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset(source)
    assert caplog.text == ""
    assert dataset.class_names == ("cat", "dog")
    assert dataset.category_ids == (3, 7)
    assert dataset.source is source
    assert [record.image_id for record in dataset.records] == [2, 9]
    empty, full = dataset.records
    assert full.file_name == str(source.image_root / "9.png")
    assert (full.height, full.width) == (20, 50)
    assert full.boxes.dtype == np.float32
    np.testing.assert_array_equal(full.boxes, [[1, 2, 4.5, 6], [0, 0, 50, 20]])
    assert full.classes.dtype == np.int64
    assert full.classes.tolist() == [1, 0]
    assert full.iscrowd.dtype == np.bool_
    assert full.iscrowd.tolist() == [False, True]
    assert empty.boxes.shape == (0, 4)
    assert empty.classes.shape == empty.iscrowd.shape == (0,)


def test_inner_folders_and_links_inside_are_fine(coco):
    source = coco.write(
        [coco.image(1, file_name="sub/../sub/a.png"), coco.image(2, file_name="link.png")]
    )
    (source.image_root / "sub").mkdir()
    Image.new("RGB", (40, 30)).save(source.image_root / "sub" / "a.png")
    (source.image_root / "link.png").symlink_to(source.image_root / "sub" / "a.png")
    assert len(load_dataset(source).records) == 2


def test_the_image_folder_itself_may_be_a_link(coco):
    source = coco.write([coco.image(1)])
    link = coco.folder / "link"
    link.symlink_to(source.image_root)
    dataset = load_dataset(dataclasses.replace(source, image_root=link))
    assert dataset.records[0].file_name == str(link / "1.png")


@pytest.mark.needs_detectron2
def test_equals_detectron2(bccd):
    d2_coco = pytest.importorskip("detectron2.data.datasets.coco")
    d2_utils = pytest.importorskip("detectron2.data.detection_utils")
    d2_data = pytest.importorskip("detectron2.data")
    json_file, root = str(bccd / "annotations/instances_val.json"), str(bccd / "images")
    name = "cascade_det_test_bccd"
    theirs = d2_coco.load_coco_json(json_file, root, name)
    ours = load_dataset(find_dataset("bccd", [("bccd", json_file, root)]))
    meta = d2_data.MetadataCatalog.get(name)
    assert list(ours.class_names) == meta.thing_classes
    assert dict(meta.thing_dataset_id_to_contiguous_id) == {
        category_id: index for index, category_id in enumerate(ours.category_ids)
    }
    assert len(ours.records) == len(theirs)
    for our, their in zip(ours.records, theirs, strict=True):
        for key in ("file_name", "image_id", "height", "width"):
            assert getattr(our, key) == their[key]
        boxes = np.array([d2_utils.get_bbox(entry) for entry in their["annotations"]], np.float32)
        np.testing.assert_array_equal(our.boxes, boxes.reshape(-1, 4))
        assert our.classes.tolist() == [entry["category_id"] for entry in their["annotations"]]


# -- bad entries ----------------------------------------------------------------------------------

BAD_BOXES = {
    "unknown image": {"image_id": 99},
    "unknown image (text)": {"image_id": "one"},
    "unknown image (no digits of ours)": {"image_id": "9" * 5000},
    "unknown image (float)": {"image_id": 1.5},
    "unknown image (not a number)": {"image_id": NAN},
    "image as text": {"image_id": "1"},
    "image as float": {"image_id": 1.0},
    "category as float": {"category_id": 3.0},
    "id as float": {"id": 2.0},
    "id beyond": {"id": 2**63},
    "unknown image (list)": {"image_id": [1]},
    "unknown image (none)": {"image_id": None},
    "unknown category": {"category_id": 99},
    "unknown category (true)": {"category_id": True},
    "id": {"id": None},
    "id that another has": {"id": 1},
    "no box": {"bbox": None},
    "three numbers": {"bbox": [1, 2, 3]},
    "text": {"bbox": [1, 2, 3, "4"]},
    "true": {"bbox": [1, 2, 3, True]},
    "not a number": {"bbox": [NAN, 2, 3, 4]},
    "infinite": {"bbox": [1, 2, INF, 4]},
    "beyond float32": {"bbox": [1, 2, 10**400, 4]},
    "negative width": {"bbox": [1, 2, -3, 4]},
    "negative height": {"bbox": [1, 2, 3, -4]},
    "outside (left)": {"bbox": [-9, 2, 9, 4]},
    "outside (right)": {"bbox": [40, 2, 3, 4]},
    "outside (above)": {"bbox": [3, -5, 3, 4]},
    "outside (below)": {"bbox": [3, 30.5, 3, 4]},
    "area": {"area": "9"},
    "area (not a number)": {"area": NAN},
    "iscrowd": {"iscrowd": 2},
    "ignore": {"ignore": 1},
}
SAID = {
    "unknown image": "annotation of an unknown image",
    "unknown category": "annotation of an unknown category",
    "image as text": "annotation whose 'image_id' is text, not an integer (1, not \"1\")",
    "image as float": "annotation whose 'image_id' is a float, not an integer (1, not 1.0)",
    "category as float": "annotation whose 'category_id' is a float, not an integer (1, not 1.0)",
    "id as float": "annotation whose 'id' is a float, not an integer (1, not 1.0)",
    "id beyond": "annotation whose 'id' is beyond 64 bits",
    "id": "annotation without an integer 'id'",
    "id that another has": "annotation that shares its id with another",
    "negative width": "box of negative width or height",
    "negative height": "box of negative width or height",
    "outside": "box outside its image",
    "area": "annotation whose 'area' is not a finite number",
    "iscrowd": "annotation whose 'iscrowd' is neither 0 nor 1",
    "ignore": "annotation with 'ignore', which is not supported (use 'iscrowd')",
}


@pytest.mark.parametrize("case", BAD_BOXES)
def test_bad_annotation(coco, caplog, case):
    said = SAID.get(case.split(" (")[0], "box that is not four finite numbers")
    good, bad = coco.box(1, 1), coco.box(2, 1) | BAD_BOXES[case]
    source = coco.write([coco.image(1)], [good, bad])
    with pytest.raises(DatasetError) as caught:
        load_dataset(source)
    assert f"1 x {said}: annotation" in str(caught.value)
    assert str(source.json_file) in str(caught.value)
    assert "CASCADE.ON_BAD_DATA" in str(caught.value)

    with caplog.at_level(logging.WARNING):
        dataset = load_dataset(source, "skip")
    np.testing.assert_array_equal(dataset.records[0].boxes, [[5, 6, 15, 18]])
    assert f"1 x {said}: annotation" in caplog.text


BAD_IMAGES = {
    "no name": ({"file_name": None}, "without a usable 'file_name'"),
    "empty name": ({"file_name": ""}, "without a usable 'file_name'"),
    "name is a number": ({"file_name": 3}, "without a usable 'file_name'"),
    "NUL": ({"file_name": "a\0b.png"}, "without a usable 'file_name'"),
    "half a surrogate pair": ({"file_name": "\ud800/a.png"}, "without a usable 'file_name'"),
    "up": ({"file_name": "../secret.png"}, "leaves the image folder"),
    "up and down": ({"file_name": "sub/../../set.json"}, "leaves the image folder"),
    "neighbour": ({"file_name": "../set2/a.png"}, "leaves the image folder"),
    "absolute": ({"file_name": "/etc/passwd"}, "leaves the image folder"),
    "the folder": ({"file_name": "."}, "leaves the image folder"),
    "linked file": ({"file_name": "link.png"}, "behind a link out of its folder"),
    "linked folder": ({"file_name": "linked/a.png"}, "behind a link out of its folder"),
    "up from a link": ({"file_name": "linked/../a.png"}, "leaves the image folder"),
    "backslashes": ({"file_name": "images\\2.png"}, "missing image file, of a Windows path"),
    "a drive": ({"file_name": "C:/images/2.png"}, "missing image file, of a Windows path"),
    "a space too many": ({"file_name": "2.png "}, "missing image file: image 2 ('2.png ')"),
    "a name of 300 bytes": ({"file_name": "x" * 300}, "image file that cannot be read"),
    "a folder": ({"file_name": "folder"}, "image that is not a file"),
    "a pipe": ({"file_name": "pipe"}, "image that is not a file"),
    "a device": ({"file_name": "device"}, "behind a link out of its folder"),
    "a link to itself": ({"file_name": "loop.png"}, "image file that cannot be read"),
    "no height": ({"height": None}, "image without an integer 'height'"),
    "zero width": ({"width": 0}, "image whose 'width' is not above 0"),
    "width is text": ({"width": "40"}, "image whose 'width' is text, not an integer"),
    "height is a float": ({"height": 30.0}, "image whose 'height' is a float, not an integer"),
    "height is true": ({"height": True}, "image without an integer 'height'"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_image(coco, caplog, case, tmp_path_factory):
    changes, said = BAD_IMAGES[case]
    images = [coco.image(1), coco.image(2) | changes]
    images[1] = {key: value for key, value in images[1].items() if value is not None}
    source = coco.write(images, [coco.box(1, 1), coco.box(2, 2)])
    (source.image_root / "link.png").symlink_to(tmp_path_factory.mktemp("far") / "a.png")
    (source.image_root / "linked").symlink_to(tmp_path_factory.mktemp("far"))
    (source.image_root / "loop.png").symlink_to("loop.png")
    (source.image_root / "device").symlink_to("/dev/zero")
    (source.image_root / "folder").mkdir()
    os.mkfifo(source.image_root / "pipe")
    with pytest.raises(DatasetError, match=re.escape(said)) as caught:
        load_dataset(source)
    # The annotation of the bad image is not reported as well.
    assert str(caught.value).count(" x ") == 1

    with caplog.at_level(logging.WARNING):
        dataset = load_dataset(source, "skip")
    assert [record.image_id for record in dataset.records] == [1]
    assert said in caplog.text


def test_all_issues_are_listed_together_with_counts_and_three_examples(coco):
    annotations = [coco.box(index, 1, category_id=50 + index) for index in range(5)]
    annotations.append(coco.box(90, 77))
    source = coco.write([coco.image(1), coco.image(2, width=0)], annotations)
    with pytest.raises(DatasetError) as caught:
        load_dataset(source)
    message = str(caught.value)
    assert "5 x annotation of an unknown category" in message
    shown = [f"category_id {50 + index}" in message for index in range(5)]
    assert shown == [True, True, True, False, False]
    assert "1 x annotation of an unknown image: annotation 90 (image_id 77" in message
    assert "1 x image whose 'width' is not above 0: image 2" in message


def test_boxes_of_no_area_are_left_out_with_a_warning(coco, caplog):
    annotations = [coco.box(1, 1, (1, 2, 0, 5)), coco.box(2, 1, (1, 2, 5, 0.0)), coco.box(3, 1)]
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset(coco.write([coco.image(1)], annotations))
    assert len(dataset.records[0].boxes) == 1
    assert "2 x box of zero width or height: annotation 1" in caplog.text


def test_ground_truth_is_kept_where_asked_for(coco):
    """All usable entries, boxes of no area included."""
    boxes = [
        coco.box(5, 2, (1, 2, 3, 4), area=7.5, segmentation=[[1, 2, 3, 4, 5, 6]]),
        coco.box(6, 2, (1, 2, 0, 4), iscrowd=1, area=None),
        coco.box(7, 1, (1, 2, -1, 4)),
        coco.box(8, 3),
    ]
    source = coco.write([coco.image(2), coco.image(1), coco.image(3)], boxes)
    (source.image_root / "3.png").unlink()
    assert load_dataset(source, "skip").ground_truth == {}
    dataset = load_dataset(source, "skip", keep_ground_truth=True)
    assert dataset.ground_truth == {
        "images": [coco.image(1), coco.image(2)],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": [
            coco.box(5, 2, (1, 2, 3, 4), area=7.5, iscrowd=0),
            coco.box(6, 2, (1, 2, 0, 4), area=0, iscrowd=1),
        ],
    }
    assert dataset.left_out == {"box of negative width or height": 1, "missing image file": 1}
    assert [len(record.boxes) for record in dataset.records] == [0, 1]


def test_ground_truth_of_a_json_without_annotations_has_none(coco):
    dataset = load_dataset(coco.write([coco.image(1)], None), keep_ground_truth=True)
    assert sorted(dataset.ground_truth) == ["categories", "images"]


def test_processes_that_check_a_part_each_find_the_same(coco, caplog):
    """Each of two processes is given the findings of both."""
    images = [coco.image(number) for number in range(1, 8)]
    source = coco.write(images, [coco.box(n, n) for n in range(1, 8)])
    for number in (2, 5, 6):
        (source.image_root / f"{number}.png").unlink()
    found = {}

    def keep(rank):
        return lambda mine: found.setdefault(rank, mine) and [mine]

    for rank in (0, 1):
        load_dataset(source, "skip", share=(rank, 2), gather=keep(rank))
    assert sorted([*found[0], *found[1]]) == [2, 5, 6]
    assert found[0]
    assert found[1]
    for rank in (0, 1):
        both = [found[0], found[1]]
        dataset = load_dataset(source, "skip", share=(rank, 2), gather=lambda _, both=both: both)
        assert [record.image_id for record in dataset.records] == [1, 3, 4, 7]
        assert dataset.left_out == {"missing image file": 3}
    assert caplog.text.count("3 x missing image file") == 1  # by the first process alone


def test_a_wrong_folder_is_recognised(coco):
    source = coco.write([coco.image(1)], [coco.box(1, 1)])
    (source.image_root / "1.png").unlink()
    with pytest.raises(DatasetError, match=r"No image was found: is .*/set their folder\?"):
        load_dataset(source)


def test_minival_may_repeat_annotation_ids(coco):
    annotations = [coco.box(1, 1), coco.box(1, 1)]
    source = coco.write([coco.image(1)], annotations, name="instances_minival2014")
    assert len(load_dataset(source).records[0].boxes) == 2


# -- several sets ---------------------------------------------------------------------------------


def test_same_classes(coco):
    def dataset(name, *categories):
        entries = [{"id": category_id, "name": text} for category_id, text in categories]
        return load_dataset(coco.write([], name=name, categories=entries))

    first = dataset("first", (1, "a"), (2, "b"))
    check_same_classes([])
    check_same_classes([first])
    check_same_classes([first, dataset("second", (2, "b"), (1, "a"))])
    with pytest.raises(DatasetError, match=r"'first' and 'third'.*\(2, 'b'\).*\(2, 'c'\)"):
        check_same_classes([first, dataset("third", (1, "a"), (2, "c"))])
    with pytest.raises(DatasetError, match=r"only the second has \(3, 'b'\)"):
        check_same_classes([first, first, dataset("other_ids", (1, "a"), (3, "b"))])

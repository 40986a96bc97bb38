"""Annotation files without a usable data set, and their error messages."""

import logging
import os

import pytest

from cascade_det.data import annotation_file
from cascade_det.data.coco import load_dataset
from cascade_det.errors import DatasetError

CATEGORY = '"categories": [{"id": 1, "name": "a"}]'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not valid json"),
        ('{"images": [', "not valid json"),
        ("[" * 100_000, "not valid json"),
        ("\0" * 9, "not valid json"),
        ('{"images": ' + "1" * 5000 + "}", r"not valid json|'images' is not a list"),
        ("[]", "no object at the top"),
        ("{}", "2 x key that COCO format requires: 'categories' is missing, 'images' is"),
        ('{"categories": [], "images": []}', "empty list of classes: 'categories'"),
        (
            '{"categories": [3], "images": []}',
            r"entry of 'categories' that is not an object: .*\[0\]",
        ),
        (
            '{"categories": [{"id": 1}], "images": []}',
            "category without a usable 'name': category 1",
        ),
        (
            '{"categories": [{"id": 1, "name": "\\ud800"}], "images": []}',
            r"category without a usable 'name': category 1: \\ud800 has control characters, or is",
        ),
        (
            '{"categories": [{"id": 1, "name": "cat\\u001b[2J"}], "images": []}',
            r"category without a usable 'name': category 1: cat\\x1b\[2J has control characters",
        ),
        (
            '{"categories": [{"id": 1, "name": "' + "x" * 10_000 + '"}], "images": []}',
            "category without a usable 'name': category 1: x+…x+ has 10,000 characters, and 255",
        ),
        (
            '{"categories": [{"id": 1, "name": ["cat"]}], "images": []}',
            r"category without a usable 'name': category 1: \['cat'\] is not text",
        ),
        (
            '{"categories": [{"id": 1.0, "name": "a"}], "images": []}',
            r"category whose 'id' is a float, not an integer \(1, not 1\.0\): category 1\.0",
        ),
        (
            '{"categories": [{"id": "1", "name": "a"}], "images": []}',
            "category whose 'id' is text, not an integer .*: category '1'",
        ),
        (
            '{"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "images": []}',
            r"2 x category that shares its id with another: category 1 \(name 'a'\), category 1",
        ),
        (f"{{{CATEGORY}}}", "'images' is missing"),
        (f'{{{CATEGORY}, "images": {{}}}}', "'images' is not a list"),
        (f'{{{CATEGORY}, "images": [], "annotations": 3}}', "'annotations' is not a list"),
    ],
)
def test_files_that_are_not_coco(coco, text, said):
    source = coco.write_text(text)
    for on_bad_data in ("error", "skip"):
        with pytest.raises(DatasetError, match=said) as caught:
            load_dataset(source, on_bad_data)
        assert str(source.json_file) in str(caught.value)
        assert "CASCADE.ON_BAD_DATA" not in str(caught.value)


def test_what_is_wrong_with_the_whole_and_with_entries_is_told_together(coco):
    categories = [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]
    annotations = [coco.box(1, 5, (1, 1, -3, 3), category_id=1), coco.box(2, 6, category_id=8)]
    images = [coco.image(5), coco.image(7)]
    source = coco.write(images, annotations, categories=categories)
    (source.image_root / "7.png").unlink()
    with pytest.raises(DatasetError) as caught:
        load_dataset(source)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:-1]] == [
        "2 x category that shares its id with another",
        "1 x box of negative width or height",
        "1 x annotation of an unknown image",
        "1 x missing image file",
    ]


def test_without_categories_annotations_are_not_reported(coco):
    for categories in (None, [], [{"id": "3", "name": "a"}]):
        source = coco.write([coco.image(1)], [coco.box(1, 1)], categories=categories)
        with pytest.raises(DatasetError) as caught:
            load_dataset(source)
        assert str(caught.value).count(" x ") == 1


def test_images_that_share_an_id_are_left_out_with_their_boxes(coco):
    """It is unknown which image the boxes belong to."""
    images = [coco.image(4), coco.image(4), coco.image(5)]
    source = coco.write(images, [coco.box(1, 4), coco.box(2, 5)])
    with pytest.raises(DatasetError, match="2 x image that shares its id with another: image 4"):
        load_dataset(source)
    assert [record.image_id for record in load_dataset(source, "skip").records] == [5]


@pytest.mark.parametrize(
    ("image_id", "said"),
    [
        ("1", "whose 'id' is text, not an integer"),
        ("abc", "whose 'id' is text, not an integer"),
        (1.5, "whose 'id' is a float, not an integer"),
        (9.0, r"whose 'id' is a float, not an integer \(1, not 1\.0\)"),
        (float("nan"), "whose 'id' is a float, not an integer"),
        (2**63, "whose 'id' is beyond 64 bits"),
        (None, "without an integer 'id'"),
        (True, "without an integer 'id'"),
        ([1], "without an integer 'id'"),
    ],
)
def test_images_without_an_integer_id(coco, image_id, said):
    """Their annotations are not reported as well, if they can be matched."""
    images = [coco.image(9), coco.image(1) | {"id": image_id}]
    told = isinstance(image_id, str | float | int) and image_id is not True
    boxes = [coco.box(1, 9), *([coco.box(2, image_id)] if told else [])]
    source = coco.write(images, boxes)
    with pytest.raises(DatasetError, match=f"1 x image {said}.*: image") as caught:
        load_dataset(source)
    assert str(caught.value).count(" x ") == 1
    assert len(load_dataset(source, "skip").records) == 1


def test_gaps_in_ids_are_fine(coco):
    categories = [{"id": 90, "name": "last"}, {"id": -4, "name": "first"}]
    images = [coco.image(10**12), coco.image(0), coco.image(-5)]
    boxes = [coco.box(7 * n, image["id"], category_id=90) for n, image in enumerate(images)]
    dataset = load_dataset(coco.write(images, boxes, categories=categories))
    assert [record.image_id for record in dataset.records] == [-5, 0, 10**12]
    assert dataset.category_ids == (-4, 90)
    assert [record.classes.tolist() for record in dataset.records] == [[1]] * 3


def test_categories_without_a_box_are_logged(coco, caplog):
    with caplog.at_level(logging.INFO):
        load_dataset(coco.write([coco.image(1)], [coco.box(1, 1)]))
    assert "no box of 1 of 2 categories: dog" in caplog.text
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_a_missing_json_and_a_pipe(coco):
    source = coco.write([])
    source.json_file.unlink()
    for _ in range(2):
        with pytest.raises(DatasetError, match=r"set\.json: there is no such file"):
            load_dataset(source)
        if not source.json_file.exists():
            os.mkfifo(source.json_file)  # reading it would block for ever


def test_json_that_does_not_fit_in_memory_is_not_read(coco, monkeypatch):
    source = coco.write([coco.image(1)], [coco.box(1, 1)])
    size = source.json_file.stat().st_size
    monkeypatch.setattr(annotation_file, "available_memory", lambda: 10 * size)
    load_dataset(source)
    monkeypatch.setattr(annotation_file, "available_memory", lambda: 2 * size)
    with pytest.raises(
        DatasetError, match=r"set\.json: reading it takes .* of memory, and .* available"
    ):
        load_dataset(source)


def test_available_memory_is_limited_by_the_container(tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 900 kB\nMemAvailable:    500 kB\n")
    monkeypatch.setattr(annotation_file, "_MEMINFO", meminfo)
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(annotation_file, "_CGROUP_LIMIT", limit)
    assert annotation_file.available_memory() == 500 * 1024
    limit.write_text("max\n")
    assert annotation_file.available_memory() == 500 * 1024
    limit.write_text("7000\n")
    assert annotation_file.available_memory() == 7000
    meminfo.unlink()
    assert annotation_file.available_memory() is None

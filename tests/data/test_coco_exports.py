"""COCO files as annotation tools export them load as they are.

Each is written after the exporter's code or files of its users; what is special is in the comments.
"""

import json

import pytest
from PIL import Image

from cascade_det.data.catalog import dataset_of_files
from cascade_det.data.coco import load_dataset
from cascade_det.errors import DatasetError

SIZE = {"width": 64, "height": 48}

# CVAT's "COCO 1.0": annotations/instances_default.json, with attributes of the program's own and
# subfolders in names. A mask of its brush is RLE, and then iscrowd is 1.
CVAT = {
    "licenses": [{"name": "", "id": 0, "url": ""}],
    "info": {"contributor": "", "date_created": "", "version": "", "year": ""},
    "categories": [
        {"id": 1, "name": "cat", "supercategory": ""},
        {"id": 2, "name": "dog", "supercategory": ""},
    ],
    "images": [
        {"id": 1, **SIZE, "file_name": "day/a.jpg", "license": 0, "flickr_url": ""}
        | {"coco_url": "", "date_captured": 0}
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 2, "segmentation": [], "area": 200.0}
        | {"bbox": [10.5, 20, 20, 10], "iscrowd": 0}
        | {"attributes": {"occluded": False, "rotation": 0.0}},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [0.0, 0.0, 2.0, 48.0], "area": 96.0}
        | {"segmentation": {"counts": [0, 96, 2976], "size": [48, 64]}, "iscrowd": 1}
        | {"attributes": {"occluded": False}},
    ],
}
# Label Studio's result.json beside images/: ids and categories from 0, names with the folder and
# the prefix of an upload, "ignore", an empty segmentation.
LABEL_STUDIO = {
    "images": [{**SIZE, "id": 0, "file_name": "images/3b5f8a1e-a.jpg"}],
    "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
    "annotations": [
        {"id": 0, "image_id": 0, "category_id": 1, "segmentation": [], "ignore": 0}
        | {"bbox": [10.5, 20.0, 20.000000000000004, 10.0], "iscrowd": 0, "area": 200.00000000000006}
    ],
    "info": {"year": 2026, "version": "1.0", "contributor": "Label Studio", "url": ""},
}
# Roboflow's train/_annotations.coco.json beside the images: category 0 is the name of the project,
# which no object has.
ROBOFLOW = {
    "info": {"year": "2026", "version": "1", "description": "Exported from roboflow.com"},
    "licenses": [{"id": 1, "url": "https://example.org", "name": "Public Domain"}],
    "categories": [
        {"id": 0, "name": "pets", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "pets"},
        {"id": 2, "name": "dog", "supercategory": "pets"},
    ],
    "images": [
        {"id": 0, "license": 1, "file_name": "a_jpg.rf.0a1b.jpg", **SIZE}
        | {"date_captured": "2026-01-01T00:00:00+00:00", "extra": {"name": "a.jpg"}}
    ],
    "annotations": [
        {"id": 0, "image_id": 0, "category_id": 2, "bbox": [10.5, 20, 20, 10], "area": 200}
        | {"segmentation": [], "iscrowd": 0}
    ],
}
# The script labelme2coco.py of LabelMe: nulls, and neither a box of whole numbers nor ids from 1.
LABELME = {
    "info": {"description": None, "url": None, "version": None, "year": 2026},
    "licenses": [{"url": None, "id": 0, "name": None}],
    "images": [
        {"license": 0, "url": None, "file_name": "JPEGImages/a.jpg", **SIZE}
        | {"date_captured": None, "id": 0}
    ],
    "type": "instances",
    "annotations": [
        {"id": 0, "image_id": 0, "category_id": 1, "area": 100.0, "iscrowd": 0}
        | {"segmentation": [[10.5, 20.0, 30.5, 20.0, 20.0, 30.0]]}
        | {"bbox": [10.5, 20.0, 20.0, 10.0]}
    ],
    "categories": [
        {"supercategory": None, "id": 0, "name": "cat"},
        {"supercategory": None, "id": 1, "name": "dog"},
    ],
}
# VIA 2: a rectangle is a polygon too, and the attribute's name the supercategory.
VIA = {
    "info": {"year": 2026, "version": "1.0", "description": "VIA project exported to COCO format"},
    "images": [
        {"id": 1, **SIZE, "file_name": "a.jpg", "license": 0, "flickr_url": "./a.jpg"}
        | {"coco_url": "./a.jpg", "date_captured": ""}
    ],
    "annotations": [
        {"segmentation": [[10.5, 20, 30.5, 20, 30.5, 30, 10.5, 30]], "area": 200, "iscrowd": 0}
        | {"bbox": [10.5, 20, 20, 10], "id": 1, "image_id": 1, "category_id": 2}
    ],
    "licenses": [{"id": 0, "name": "Unknown License", "url": ""}],
    "categories": [
        {"supercategory": "type", "id": 1, "name": "cat"},
        {"supercategory": "type", "id": 2, "name": "dog"},
    ],
}
# Another VIA 2: the id of the image is text where an object names it, and its polygon is bare.
VIA_TEXT = {
    **VIA,
    "images": [{**VIA["images"][0], "id": 0}],
    "annotations": [
        {"id": "0", "image_id": "0", "category_id": "2", "area": 200, "iscrowd": 0}
        | {"segmentation": [10.5, 20, 30.5, 20, 30.5, 30, 10.5, 30], "bbox": [10.5, 20, 20, 10]}
    ],
}
# VIA 2.0.9 and later: a class that is no number, beside images whose names begin with a digit.
VIA_NULL = {
    **VIA,
    "images": [{**VIA["images"][0], "id": 12, "file_name": "12.jpg"}],
    "annotations": [{**VIA["annotations"][0], "image_id": 12, "category_id": None}],
    "categories": [{"supercategory": "type", "id": None, "name": "dog"}],
}
# No tool's own: what scripts leave out.
BARE = {
    "images": [{"id": 7, "file_name": "a.jpg", **SIZE}],
    "categories": [{"id": 4, "name": "dog"}],
    "annotations": [{"id": 1, "image_id": 7, "category_id": 4, "bbox": [10.5, 20, 20, 10]}],
}
EXPORTS = {
    "CVAT": CVAT,
    "Label Studio": LABEL_STUDIO,
    "Roboflow": ROBOFLOW,
    "LabelMe": LABELME,
    "VIA": VIA,
    "VIA, ids as text": VIA_TEXT,
    "VIA, class as null": VIA_NULL,
    "bare": BARE,
}


def write(folder, content):
    for image in content["images"]:
        path = folder / image["file_name"]
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 48)).save(path)
    (folder / "result.json").write_text(json.dumps(content))
    return dataset_of_files(str(folder / "result.json"))


@pytest.mark.parametrize("masks", [None, "keep"])
@pytest.mark.parametrize("tool", EXPORTS)
def test_an_export_loads_as_it_is(tool, masks, tmp_path):
    dataset = load_dataset(
        write(tmp_path, EXPORTS[tool]), masks=masks, keep_ground_truth=True, decode=True
    )
    (record,) = dataset.records
    objects = ~record.iscrowd
    assert record.boxes[objects].tolist() == [[10.5, 20, 30.5, 30]]
    assert [dataset.class_names[k] for k in record.classes[objects]] == ["dog"]
    assert record.iscrowd.sum() == (tool == "CVAT")
    true = dataset.ground_truth["annotations"][0]
    assert true["iscrowd"] == 0
    assert true["area"] == pytest.approx(100 if tool == "LabelMe" else 200)
    if masks:
        has_mask = record.masks[0] is not None
        assert has_mask == tool.startswith(("LabelMe", "VIA"))


def test_roboflows_name_of_the_project_is_a_class_without_objects(tmp_path):
    dataset = load_dataset(write(tmp_path, ROBOFLOW))
    assert dataset.class_names == ("pets", "cat", "dog")


def test_what_via_cannot_number_is_listed(tmp_path):
    """VIA writes null for the category of an attribute that is plain text."""
    content = json.loads(json.dumps(VIA))
    content["annotations"][0]["category_id"] = None
    with pytest.raises(DatasetError, match="1 x annotation of an unknown category"):
        load_dataset(write(tmp_path, content))


def test_only_what_is_certain_of_a_via_export_is_repaired(tmp_path):
    """Of two classes as null, which one an object has is lost; "01" may not be 1."""
    two = {**VIA_NULL, "categories": [*VIA_NULL["categories"] * 2]}
    with pytest.raises(DatasetError, match="2 x category without an integer 'id'"):
        load_dataset(write(tmp_path, two))
    padded = {**VIA, "annotations": [{**VIA["annotations"][0], "image_id": "01"}]}
    with pytest.raises(DatasetError, match="1 x annotation whose 'image_id' is text"):
        load_dataset(write(tmp_path, padded))


@pytest.mark.parametrize("part", ["info", "images", "categories", "annotations"])
@pytest.mark.parametrize("value", [None, 3, [None, 3, []], {"a": 1}])
def test_a_broken_via_export_is_an_error(part, value, tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({**VIA_TEXT, part: value}))
    with pytest.raises(DatasetError):
        load_dataset(dataset_of_files(str(tmp_path / "result.json")))

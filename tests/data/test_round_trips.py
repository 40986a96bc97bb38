"""Data sets written in another format and read again, with the largest difference of a box."""

import json
import tempfile
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cascade_det.commands import convert
from cascade_det.data.catalog import dataset_of_files
from cascade_det.data.coco import load_dataset
from cascade_det.data.issues import Issues
from cascade_det.data.label_files import label_names
from cascade_det.data.label_studio import label_studio_tasks
from cascade_det.data.labelme import write_labelme
from cascade_det.data.voc import write_voc
from cascade_det.data.yolo import write_yolo
from cascade_det.errors import DatasetError
from cascade_det.masks.segmentation import draw

WIDTH, HEIGHT = 321, 117  # fractions of these have no end
WRITERS = {
    "yolo": (write_yolo, "data.yaml"),
    "voc": (write_voc, ""),
    "labelme": (write_labelme, ""),
}
# Pixels. YOLO has 9 digits of a fraction, Pascal VOC 6 digits of a pixel; ids and nothing else
# of LabelMe change.
LARGEST = {"yolo": 2 * max(WIDTH, HEIGHT) * 1e-9, "voc": 2e-6, "labelme": 0}


def content_of(boxes, **more):
    """The content of a COCO json with boxes (category, x, y, w, h) on one of two images."""
    images = [
        {"id": 8, "file_name": "day/a b.jpg", "width": WIDTH, "height": HEIGHT},
        {"id": 5, "file_name": "b.c.png", "width": WIDTH, "height": HEIGHT},
    ]
    annotations = [
        {"id": 10 + k, "image_id": 8, "category_id": category, "bbox": box, "iscrowd": 0} | more
        for k, (category, *box) in enumerate(boxes)
    ]
    names = [{"id": 3, "name": "cat & <dog>"}, {"id": 7, "name": "été"}]
    return {"images": images, "annotations": annotations, "categories": names}


def there_and_back(kind, content, folder):
    """The data set that is read again, and what the format could not hold."""
    images = folder / "pictures"
    for image in content["images"]:
        path = images / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            Image.new("L", (image["width"], image["height"])).save(path)
    write, name = WRITERS[kind]
    target, dropped = folder / kind, Issues()
    target.mkdir()
    write(content, images, target, dropped)
    source = dataset_of_files(str(target / name), str(images))
    return load_dataset(source, masks="keep", keep_ground_truth=True), dropped


def numbers(low, high):
    return st.floats(low, high) | st.integers(int(low), int(high)).map(float)


sides = st.floats(1e-3, 8) | st.integers(1, 8).map(float)
boxes_inside = st.tuples(
    st.sampled_from([3, 7]), numbers(0, WIDTH - 8), numbers(0, HEIGHT - 8), sides, sides
)


@pytest.mark.parametrize("kind", WRITERS)
@settings(max_examples=8)
@given(boxes=st.lists(boxes_inside, min_size=1, max_size=20))
def test_any_boxes_come_back(kind, boxes):
    content = content_of(boxes)
    with tempfile.TemporaryDirectory() as folder:
        dataset, dropped = there_and_back(kind, content, Path(folder))
    assert not dropped
    truth = dataset.ground_truth
    assert [image["file_name"] for image in truth["images"]] == ["b.c.png", "day/a b.jpg"]
    assert all(entry["image_id"] == 2 for entry in truth["annotations"])
    names = {3: "cat & <dog>", 7: "été"}
    found = [dataset.class_names[entry["category_id"] - 1] for entry in truth["annotations"]]
    assert found == [names[category] for category, *_ in boxes]
    expected = np.array([box for _, *box in boxes]).reshape(-1, 4)
    back = np.array([entry["bbox"] for entry in truth["annotations"]]).reshape(-1, 4)
    # LabelMe holds corners, and a corner minus another is not the width to the last bit.
    rounding = np.spacing(float(WIDTH))
    np.testing.assert_allclose(back, expected, rtol=0, atol=LARGEST[kind] + 2 * rounding)


@pytest.mark.parametrize("kind", ["yolo", "labelme"])
def test_polygons_come_back(kind, tmp_path):
    """Pixel by pixel; YOLO joins the two of an object."""
    polygons = [[10, 10, 60, 12.5, 30, 70], [100.25, 20, 180, 20, 180, 90, 100, 90]]
    box = [10, 10, 170, 80]
    content = content_of([(3, *box)], segmentation=polygons)
    dataset, dropped = there_and_back(kind, content, tmp_path)
    (mask,) = dataset.records[1].masks
    expected = draw([np.array(p, float) for p in polygons], HEIGHT, WIDTH)
    assert expected.sum() > 5000
    np.testing.assert_array_equal(draw(mask, HEIGHT, WIDTH), expected)
    np.testing.assert_allclose(dataset.records[1].boxes, [[10, 10, 180, 90]], atol=1e-4)
    assert sum(dropped.counts.values()) == (kind == "yolo")


@pytest.mark.parametrize("kind", WRITERS)
def test_what_a_format_cannot_hold_is_listed(kind, tmp_path):
    rle = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
    content = content_of([(3, 1, 2, 5, 5), (7, 1, 2, 5, 5), (3, 4, 4, 0, 2)])
    content["annotations"][0]["segmentation"] = rle
    content["annotations"][1]["iscrowd"] = 1
    dataset, dropped = there_and_back(kind, content, tmp_path)
    assert sorted(dropped.counts.values()) == [1, 1, 1]
    assert [len(record.boxes) for record in dataset.records] == [0, 1]


def test_boxes_beyond_the_image_are_clipped_for_yolo(tmp_path):
    content = content_of([(3, -4, 100, WIDTH + 9, 30)])
    dataset, _ = there_and_back("yolo", content, tmp_path)
    np.testing.assert_allclose(dataset.records[1].boxes, [[0, 100, WIDTH, HEIGHT]], atol=1e-4)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("a.jpg", "a.png"), "would share the label file 'a.txt'"),
        (("../a.jpg",), "leaves the image folder"),
        (("a\n.jpg",), "unprintable"),
    ],
)
def test_names_that_label_files_cannot_have(names, said, tmp_path):
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    with pytest.raises(DatasetError, match=said):
        label_names({"images": images}, tmp_path, ".txt")


def test_tasks_of_label_studio_have_percents_and_scores():
    content = content_of([(3, 10, 11.7, 32.1, 58.5)])
    (task, empty) = label_studio_tasks(content, Path("x"), "s3://cells/", Issues())
    assert task["data"] == {"image": "s3://cells/day/a b.jpg"}
    assert empty["annotations"] == [{"result": []}]
    (result,) = task["annotations"][0]["result"]
    value = result["value"]
    assert (result["type"], value["rectanglelabels"]) == ("rectanglelabels", ["cat & <dog>"])
    assert (result["original_width"], result["original_height"]) == (WIDTH, HEIGHT)
    percents = [value[key] for key in ("x", "y", "width", "height")]
    np.testing.assert_allclose(percents, [1000 / 321, 10, 10, 50])
    prediction = {"image_id": 8, "category_id": 7, "bbox": [0, 0, 321, 117], "score": 0.75}
    more = prediction | {"score": 0.5}
    task, empty = label_studio_tasks(content, Path("x"), "", Issues(), [prediction, more])
    (predicted,) = task["predictions"]
    assert "annotations" not in task
    assert predicted["score"] == 0.5
    assert [entry["score"] for entry in predicted["result"]] == [0.75, 0.5]
    assert predicted["result"][0]["value"]["width"] == 100


# -- the command ----------------------------------------------------------------------------------


def run(*arguments):
    return convert.main([str(argument) for argument in arguments])


@pytest.fixture
def shapes(tmp_path):
    """A json without areas, and its images."""
    content = content_of([(3, 10, 20, 30, 40), (7, 0, 0, WIDTH, HEIGHT)])
    (tmp_path / "in.json").write_text(json.dumps(content))
    for image in content["images"]:
        path = tmp_path / "images" / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(path)
    return tmp_path


@pytest.mark.parametrize(("kind", "name"), [("yolo", "data.yaml"), ("voc", ""), ("labelme", "")])
def test_the_command_there_and_back(kind, name, shapes, capsys):
    images = shapes / "images"
    assert run(shapes / "in.json", "--to", kind, "--output", shapes / kind, "--images", images) == 0
    back = shapes / "back.json"
    given = ("--images", images, "--to", "coco", "--output", back)
    assert run(shapes / kind / name, *given) == 0
    assert "2 images, 2 objects, 2 classes" in capsys.readouterr().out
    found = [entry["bbox"] for entry in json.loads(back.read_text())["annotations"]]
    np.testing.assert_allclose(found, [[10, 20, 30, 40], [0, 0, WIDTH, HEIGHT]], atol=1e-5)
    # A folder that exists is never replaced.
    assert run(shapes / "in.json", "--to", kind, "--output", shapes / kind) == 1
    assert "was not made here" in capsys.readouterr().err


def test_the_command_leaves_nothing_of_a_failure(shapes, capsys):
    (shapes / "bad.json").write_text((shapes / "in.json").read_text().replace('"bbox"', '"box"'))
    target = shapes / "out"
    assert run(shapes / "bad.json", "--to", "yolo", "--output", target) == 1
    assert "2 x box that is not four finite numbers" in capsys.readouterr().err
    assert not target.exists()
    skip = ("--on-bad-data", "skip")
    assert run(shapes / "bad.json", "--to", "yolo", "--output", target, *skip) == 0


def test_predictions_become_pre_annotations(shapes, capsys):
    predictions = [{"image_id": 5, "category_id": 3, "bbox": [0, 0, 32.1, 11.7], "score": 0.5}]
    (shapes / "found.json").write_text(json.dumps(predictions))
    given = ("--predictions", shapes / "found.json", "--image-url", "http://x/")
    target = shapes / "tasks.json"
    assert run(shapes / "in.json", "--to", "label-studio", "--output", target, *given) == 0
    tasks = {task["data"]["image"]: task for task in json.loads(target.read_text())}
    (result,) = tasks["http://x/b.c.png"]["predictions"][0]["result"]
    assert result["value"]["height"] == pytest.approx(10)
    with pytest.raises(SystemExit):
        run(shapes / "in.json", "--to", "coco", "--output", target, *given)
    (shapes / "found.json").write_text(json.dumps([predictions[0] | {"image_id": 6}]))
    assert run(shapes / "in.json", "--to", "label-studio", "--output", target, *given) == 1
    assert "unknown 'image_id'" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", [convert.IMAGE_URL, "https://x/?d=", "s3://photos/"])
def test_a_browser_finds_images_of_any_name(prefix):
    """Behind a question mark an unquoted # ends the name, & begins another key and + is a space."""
    name = "day/a+b #1 50% & é.jpg"
    content = content_of([])
    content["images"][0]["file_name"] = name
    task, _ = label_studio_tasks(content, Path("x"), prefix, Issues())
    address = task["data"]["image"]
    if prefix.startswith("s3"):  # the key of an object, as it is
        assert address == prefix + name
    else:
        assert parse_qs(urlsplit(address).query, strict_parsing=True) == {"d": [name]}

"""The command against the loader itself and a scene whose colours are known."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from cascade_det.commands import show_data
from cascade_det.commands.training_pictures import tile
from cascade_det.report.colors import class_color

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quick_schedules" / "instant_test.yaml"
RED = (200, 30, 10)  # RGB


@pytest.fixture
def options(tmp_path):
    """One red picture with one box in the upper left quarter."""
    Image.new("RGB", (80, 60), RED).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 4, "file_name": "a.png", "width": 80, "height": 60}],
        "annotations": [{"id": 1, "image_id": 4, "category_id": 1, "bbox": [10, 5, 30, 25]}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "set.json").write_text(json.dumps(content))
    datasets = [("mine", str(tmp_path / "set.json"), str(tmp_path))]
    return [
        *("CASCADE.DATASETS", str(datasets)),
        *("DATASETS.TRAIN", "('mine',)"),
        *("DATASETS.TEST", "()"),
        *("MODEL.ROI_HEADS.NUM_CLASSES", "1"),
        *("INPUT.MIN_SIZE_TRAIN", "(120,)"),
        *("INPUT.MAX_SIZE_TRAIN", "400"),
        *("SOLVER.IMS_PER_BATCH", "2"),
    ]


def draw(tmp_path, *arguments):
    output = tmp_path / "pictures"
    status = show_data.main(["--config-file", str(CONFIG), "--output", str(output), *arguments])
    return status, output


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_pictures_have_the_colours_of_the_scene_and_boxes_where_they_are(
    tmp_path, options, image_format
):
    status, output = draw(tmp_path, "--num", "5", *options, "INPUT.FORMAT", image_format)
    assert status == 0
    names = sorted(path.name for path in output.iterdir())
    assert names == [f"000{number}_image4.png" for number in range(5)]
    sides = set()
    for name in names:
        picture = cv2.imread(str(output / name))
        assert picture.shape == (120, 160, 3)
        red = (picture[..., ::-1] == RED).all(axis=2)
        assert red.mean() > 0.6
        # Twice as large: the outline runs from 20 to 80 or, flipped, from 80 to 140; 10 to 60 down.
        assert red[70:].all()
        rows = np.flatnonzero(~red[:, 90 if red[55, 20] else 30])
        assert rows.max() == 60
        sides.add("right" if red[55, 20] else "left")
    assert sides == {"left", "right"}


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_masks_are_where_the_loader_has_them(tmp_path, options, mask_format):
    """A triangle and an RLE bar; the third object has no mask."""
    path = tmp_path / "set.json"
    content = json.loads(path.read_text())
    (box,) = content["annotations"]
    bar = [60 * 10 + 50, *[5, 55] * 29, 5, 60 * 40 + 5]  # rows 50 to 55 of columns 10 to 40
    content["annotations"] = [
        box | {"segmentation": [[10, 5, 40, 5, 10, 30]]},
        box | {"id": 2, "bbox": [10, 50, 30, 5], "segmentation": {"size": [60, 80], "counts": bar}},
        box | {"id": 3, "bbox": [45, 35, 20, 10]},
    ]
    path.write_text(json.dumps(content))
    options = [*options, "MODEL.MASK_ON", "True", "INPUT.MASK_FORMAT", mask_format]
    status, output = draw(tmp_path, "--num", "2", *options, "INPUT.RANDOM_FLIP", "none")
    assert status == 0
    picture = cv2.imread(str(output / "0000_image4.png"))
    red = (picture[..., ::-1] == RED).all(axis=2)
    assert not red[30, 24]  # inside the triangle
    assert red[50:58, 64:78].all()  # in its box, on the other side of the long edge
    assert not red[105, 50]
    assert red[113:, 20:80].all()  # below the bar
    assert red[76:88, 110:128].all()  # inside the third box


def test_a_grid_holds_all_pictures(tmp_path, options):
    status, output = draw(tmp_path, "--num", "5", "--grid", *options)
    assert status == 0
    assert [path.name for path in output.iterdir()] == ["grid.png"]
    assert cv2.imread(str(output / "grid.png")).shape == (240, 480, 3)


def test_tiles_keep_their_pixels():
    generator = np.random.default_rng(0)
    pictures = [
        generator.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((3, 5), (4, 2), (1, 1))
    ]
    grid = tile(pictures)
    assert grid.shape == (8, 10, 3)
    for picture, (top, left) in zip(pictures, ((0, 0), (0, 5), (4, 0)), strict=True):
        height, width = picture.shape[:2]
        np.testing.assert_array_equal(grid[top : top + height, left : left + width], picture)
    assert (grid[4:, 5:] == 128).all()


def test_errors_are_told_without_a_traceback(tmp_path, options, capsys):
    (tmp_path / "a.png").unlink()
    assert draw(tmp_path, *options)[0] == 1
    assert "missing image file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        draw(tmp_path, "--num", "0")


def test_no_image_of_the_data_is_replaced(tmp_path, options, capfd):
    for _ in range(2):  # Pictures that are no input are drawn again.
        status, output = draw(tmp_path, "--num", "1", *options)
        assert status == 0
    (name,) = output.iterdir()
    # What was drawn becomes a data set of its own, and is to be looked at.
    content = json.loads((tmp_path / "set.json").read_text())
    content["images"][0] |= {"file_name": name.name, "width": 160, "height": 120}
    (tmp_path / "set.json").write_text(json.dumps(content))
    datasets = [("mine", str(tmp_path / "set.json"), str(output))]
    before = name.read_bytes()
    assert draw(tmp_path, "--num", "1", *options, "CASCADE.DATASETS", str(datasets))[0] == 1
    assert f"{name} would replace the image" in capfd.readouterr().err
    assert name.read_bytes() == before


def test_the_labels_of_a_segmenter_are_drawn_after_augmentation(tmp_path):
    """A red image with a class on its left quarter, and an ignored band below."""
    labels = np.zeros((60, 80), np.uint8)
    labels[:, :20], labels[50:] = 1, 255
    for folder, array in (("images", np.full((60, 80, 3), RED, np.uint8)), ("labels", labels)):
        (tmp_path / folder).mkdir()
        Image.fromarray(array).save(tmp_path / folder / "a.png")
    own = [("mine", "folders", str(tmp_path / "images"), str(tmp_path / "labels"))]
    keys = [*("CASCADE.SEMANTIC_DATASETS", str(own)), *("DATASETS.TRAIN", "('mine',)")]
    keys += ["CASCADE.SEMANTIC_CLASSES", "['background', 'sea']", "INPUT.MIN_SIZE_TRAIN", "(120,)"]
    keys += ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "2", "SOLVER.IMS_PER_BATCH", "1"]
    shapes = "cascade_det://quick_schedules/segment_shapes.yaml"
    command = ["--config-file", shapes, "--output", str(tmp_path / "pictures"), "--num", "6"]
    assert show_data.main([*command, *keys]) == 0
    sides = set()
    for path in (tmp_path / "pictures").iterdir():
        picture = cv2.imread(str(path))[..., ::-1].astype(int)
        assert picture.shape[0] > 120  # a legend below
        assert picture.shape[1] == 160
        assert (picture[:98, 44:116] == RED).all()  # background
        half = (np.array(RED) + class_color(1)[::-1]) / 2
        is_sea = abs(picture[50, [20, 140]] - half).max(axis=1) <= 1
        assert is_sea.sum() == 1
        assert abs(picture[105:115, 10:150] - (np.array(RED) + 255) / 2).max() <= 1
        sides.add(int(is_sea.argmax()))
    assert sides == {0, 1}
    # No label image is replaced either.
    before = (tmp_path / "labels" / "a.png").read_bytes()
    (tmp_path / "labels" / "a.png").rename(tmp_path / "labels" / "0000_image0.png")
    (tmp_path / "images" / "a.png").rename(tmp_path / "images" / "0000_image0.png")
    command[3] = str(tmp_path / "labels")
    assert show_data.main([*command, *keys]) == 1
    assert (tmp_path / "labels" / "0000_image0.png").read_bytes() == before

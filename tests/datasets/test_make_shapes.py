"""The demo's data: the same pixels from the same seed, true boxes, and never a half-made folder."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import shape_scenes
from cascade_det.errors import CascadeDetError
from make_shapes import make_dataset
from shape_scenes import CLASSES, LOOKS, make_image, make_scene

SCRIPT = Path(__file__).parents[2] / "datasets" / "make_shapes.py"
SMALL = {"train": 3, "val": 2, "width": 96, "height": 64}


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@given(st.integers(0, 2**32), st.sampled_from(["train", "val"]), st.integers(0, 10**6))
@settings(max_examples=25)
def test_an_image_depends_on_its_arguments_alone(seed, split, index):
    np.random.seed(index % 100)  # noqa: NPY002  (the global generator must not matter)
    image, annotations, difficulty = make_image(seed, split, index, width=128, height=96)
    again = make_image(seed, split, index, width=128, height=96)
    np.testing.assert_array_equal(image, again[0])
    assert (annotations, difficulty) == again[1:]


def test_seed_split_and_index_all_change_the_image():
    base = make_image(0, "train", 0)[0]
    for other in [(1, "train", 0), (0, "val", 0), (0, "train", 1)]:
        assert np.abs(make_image(*other)[0].astype(int) - base).mean() > 1


@given(st.integers(0, 10**6), st.sampled_from([(320, 256), (64, 200), (33, 32)]))
@settings(max_examples=25)
def test_annotations_lie_in_the_image(index, size):
    width, height = size
    image, annotations, difficulty = make_image(3, "train", index, width=width, height=height)
    assert image.shape == (height, width, 3)
    assert image.dtype == np.uint8
    assert difficulty in LOOKS
    for annotation in annotations:
        x, y, w, h = annotation["bbox"]
        assert 1 <= annotation["category_id"] <= len(CLASSES)
        assert min(x, y) >= 0
        assert min(w, h) > 0
        assert x + w <= width + 0.01
        assert y + h <= height + 0.01
        assert max(w, h) <= 200
        assert annotation["area"] == pytest.approx(w * h, abs=0.01)
        mask = coco_mask.decode(annotation["segmentation"])
        assert mask.shape == (height, width)
        rows, columns = np.nonzero(mask)
        assert x - 1 <= columns.min() <= columns.max() <= x + w
        assert y - 1 <= rows.min() <= rows.max() <= y + h
        assert 0.3 <= annotation["visibility"] <= 1
    masks = [coco_mask.decode(annotation["segmentation"]) for annotation in annotations]
    assert np.sum(masks, axis=0).max(initial=0) <= 1  # no pixel belongs to two shapes


@pytest.mark.parametrize("name", CLASSES)
def test_boxes_are_tight_around_the_drawn_pixels(name, monkeypatch):
    """One clean shape at a time: the box of the pixels that differ is the annotated one."""
    monkeypatch.setattr(shape_scenes, "CLASSES", (name,))
    plain = {"typical": 0, "textured": 0, "clutter": (0, 0), "scratches": (0, 0), "max_covered": 0}
    plain |= {"shading": (0, 0), "blur": (0, 0), "noise": (0, 0), "contrast": (150, 150)}
    looks = {
        count: shape_scenes.Look(objects=(count, count), **plain)  # the same seed draws the same
        for count in (0, 1)
    }
    for index in range(12):
        drawn = []
        for count in (0, 1):
            monkeypatch.setattr(shape_scenes, "LOOKS", {"easy": looks[count]})
            drawn.append(make_image(0, "val", index, hard=0))
        (empty, nothing, _), (image, [annotation], _) = drawn
        assert nothing == []
        # Half of the contrast: pixels that the shape covers by about half or more.
        changed = np.linalg.norm(image.astype(float) - empty, axis=2) > 75
        x, y, w, h = cv2.boundingRect(changed.astype(np.uint8))
        found = np.array([x, y, x + w, y + h])
        bx, by, bw, bh = annotation["bbox"]
        # A sharp tip covers less than half of its last pixels.
        np.testing.assert_allclose(found, [bx, by, bx + bw, by + bh], atol=2)
        # A pixel on the edge, half covered, may be rounded to either side.
        mask = coco_mask.decode(annotation["segmentation"]).astype(bool)
        assert (mask ^ changed).sum() <= 0.02 * changed.sum() + 1


def test_boxes_of_shapes_cut_by_the_border_are_tight_around_what_is_left():
    # A triangle whose right tip lies below the image: at the border it is 25 wide, not 50.
    outline = np.array([[10.0, 10], [10, 40], [60, 70]])
    shape = shape_scenes.Shape(0, outline, None)
    annotation = shape_scenes._annotation(shape, np.ones((40, 100), bool))
    # The edge from (10, 10) to (60, 70) crosses y = 40 at x = 10 + 50 * 30 / 60 = 35.
    assert annotation["bbox"] == [10, 10, 25, 30]


def test_visibility_is_what_later_shapes_leave():
    square = np.array([[10.0, 10], [30, 10], [30, 30], [10, 30]])
    shape = shape_scenes.Shape(1, square, None)
    owner = shape_scenes._mask(shape, 40, 40) > 0.5
    assert owner.sum() == 400
    owner[:, 20:] = False  # something came over the right half
    annotation = shape_scenes._annotation(shape, owner)
    assert annotation["visibility"] == 0.5
    np.testing.assert_array_equal(coco_mask.decode(annotation["segmentation"]), owner)
    assert annotation["bbox"] == [10, 10, 20, 20]


def test_shapes_that_are_hardly_visible_are_not_annotated(monkeypatch):
    corners = np.array([[0.0, 0], [20, 0], [20, 20], [0, 20]])
    shapes = [shape_scenes.Shape(k, corners + np.array([30.0 * k, 0]), None) for k in range(3)]
    owner = np.full((64, 96), -1)
    for number, rows in enumerate((5, 6, 20)):  # of 20: a quarter, 0.3 and all of it is visible
        owner[:rows, 30 * number : 30 * number + 20] = number
    monkeypatch.setattr(shape_scenes, "_draw_objects", lambda *_: (shapes, owner))
    _, annotations, _ = make_image(0, "train", 0, width=96, height=64)
    assert [(a["category_id"], a["visibility"]) for a in annotations] == [(2, 0.3), (3, 1.0)]


def test_a_ring_has_no_pixels_in_its_hole():
    outline, hole = (part * 20 + 32 for part in shape_scenes.OUTLINES["ring"]())
    ring = shape_scenes.Shape(5, outline, hole)
    mask = shape_scenes._mask(ring, 64, 64)
    assert mask[32, 32] == 0
    assert mask.sum() == pytest.approx(np.pi * 20**2 * (1 - 0.58**2), rel=0.03)
    assert ring.area == pytest.approx(mask.sum(), rel=0.03)


def test_the_mixture_of_easy_and_hard():
    def share(hard):
        scenes = [make_image(0, "train", i, width=64, height=64, hard=hard) for i in range(80)]
        return sum(difficulty == "hard" for _, _, difficulty in scenes) / len(scenes)

    assert share(0.0) == 0
    assert share(1.0) == 1
    assert share(0.3) == pytest.approx(0.3, abs=0.16)


def test_sizes_and_classes_cover_their_range():
    scenes = [make_image(0, "train", i) for i in range(100)]
    objects = [annotation for _, annotations, _ in scenes for annotation in annotations]
    longest = np.array([max(a["bbox"][2:]) for a in objects])
    assert longest.min() < 12
    assert longest.max() > 160
    assert ((longest > 24) & (longest < 120)).mean() > 0.6
    counts = np.bincount([a["category_id"] for a in objects], minlength=7)[1:]
    assert counts.min() > 0.6 * counts.mean()
    assert 4 <= len(objects) / len(scenes) <= 8


def test_the_json_is_coco(tmp_path, capsys):
    assert make_dataset(tmp_path / "shapes", **SMALL) is True
    for split, count in (("train", 3), ("val", 2)):
        coco = COCO(tmp_path / "shapes" / f"{split}.json")
        assert sorted(coco.imgs) == list(range(1, count + 1))
        assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
        assert sorted(coco.anns) == list(range(1, len(coco.anns) + 1))
        for image in coco.imgs.values():
            pixels = cv2.imread(str(tmp_path / "shapes" / split / image["file_name"]))
            assert pixels.shape == (image["height"], image["width"], 3) == (64, 96, 3)
            drawn, annotations, difficulty = make_image(
                0, split, image["id"] - 1, width=96, height=64
            )
            # JPEG changes the noise, and little else.
            smooth = [cv2.blur(part.astype(np.float32), (5, 5)) for part in (pixels, drawn)]
            assert np.abs(smooth[0] - smooth[1]).mean() < 4
            assert image["difficulty"] == difficulty
            added = {"id", "image_id"}
            found = coco.imgToAnns[image["id"]]
            assert [{k: a[k] for k in a.keys() - added} for a in found] == annotations


@given(st.integers(0, 10**6))
@settings(max_examples=15)
def test_labels_are_the_pixels_of_the_annotated_masks(index):
    image, annotations, _, labels = make_scene(5, "val", index, width=160, height=128)
    assert labels.dtype == np.uint8
    assert labels.shape == image.shape[:2]
    painted = np.zeros_like(labels)
    for annotation in annotations:
        painted[coco_mask.decode(annotation["segmentation"]) > 0] = annotation["category_id"]
    rest = painted == 0  # background, and shapes too hidden to be annotated
    np.testing.assert_array_equal(labels[~rest], painted[~rest])
    assert labels[rest].max() <= len(CLASSES)


def test_the_shape_in_front_labels_a_pixel_even_if_hardly_visible(monkeypatch):
    corners = np.array([[0.0, 0], [20, 0], [20, 20], [0, 20]])
    shapes = [shape_scenes.Shape(k, corners, None) for k in (4, 2)]
    owner = np.full((32, 40), -1)
    owner[:20, :20] = 0
    owner[1:21, :20] = 1  # leaves one row of the first
    monkeypatch.setattr(shape_scenes, "_draw_objects", lambda *_: (shapes, owner))
    _, annotations, _, labels = make_scene(0, "train", 0, width=40, height=32)
    assert [a["category_id"] for a in annotations] == [3]
    expected = np.zeros((32, 40), np.uint8)
    expected[:1, :20], expected[1:21, :20] = 5, 3
    np.testing.assert_array_equal(labels, expected)


def test_label_images_are_written_beside_the_images(tmp_path):
    make_dataset(tmp_path / "shapes", **SMALL)
    for split, count in (("train", 3), ("val", 2)):
        files = sorted((tmp_path / "shapes" / "labels" / split).iterdir())
        assert [file.name for file in files] == [f"{n + 1:06d}.png" for n in range(count)]
        for index, file in enumerate(files):
            found = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
            drawn = make_scene(0, split, index, width=96, height=64).labels
            np.testing.assert_array_equal(found, drawn)


def test_a_folder_without_label_images_gets_them(tmp_path):
    make_dataset(tmp_path / "shapes", **SMALL)
    complete = contents(tmp_path)
    shutil.rmtree(tmp_path / "shapes" / "labels")
    assert make_dataset(tmp_path / "shapes", **SMALL) is True
    assert contents(tmp_path) == complete


@pytest.mark.parametrize("name", ["labels/train/000004.png", "labels/mine"])
def test_label_images_of_others_are_not_lost(tmp_path, name):
    make_dataset(tmp_path / "shapes", **SMALL)
    (tmp_path / "shapes" / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"{name} in it was not made"):
        make_dataset(tmp_path / "shapes", **SMALL, seed=1)
    assert contents(tmp_path) == before


def test_made_twice_is_the_same_and_made_once_is_left_alone(tmp_path):
    assert make_dataset(tmp_path / "a", **SMALL)
    assert make_dataset(tmp_path / "b", **SMALL)
    first = contents(tmp_path / "a")
    assert len(first) == 13
    assert first == contents(tmp_path / "b")
    (tmp_path / "a" / "train" / "note.txt").write_text("mine")
    assert make_dataset(tmp_path / "a", **SMALL) is False
    assert (tmp_path / "a" / "train" / "note.txt").exists()


def test_a_longer_set_begins_with_the_shorter_one(tmp_path):
    make_dataset(tmp_path / "short", **SMALL)
    make_dataset(tmp_path / "long", **{**SMALL, "train": 5})
    for name in ("train/000001.jpg", "train/000003.jpg", "val.json"):
        assert (tmp_path / "short" / name).read_bytes() == (tmp_path / "long" / name).read_bytes()


def test_other_parameters_replace_our_own_folder(tmp_path):
    make_dataset(tmp_path / "shapes", **SMALL)
    before = contents(tmp_path / "shapes")
    assert make_dataset(tmp_path / "shapes", **SMALL, seed=1) is True
    assert before != contents(tmp_path / "shapes")
    assert os.listdir(tmp_path) == ["shapes"]


@pytest.mark.parametrize("marker", [None, "not json", "[]", '{"generator": "another"}'])
def test_a_foreign_folder_is_refused(tmp_path, marker):
    folder = tmp_path / "shapes"
    folder.mkdir()
    (folder / "mine.txt").write_text("precious")
    if marker is not None:
        (folder / "parameters.json").write_text(marker)
    before = contents(folder)
    with pytest.raises(ValueError, match="was not made by this generator"):
        make_dataset(folder, **SMALL)
    assert contents(folder) == before


@pytest.mark.parametrize("old", [False, True])
def test_an_interrupt_leaves_no_half_made_folder(tmp_path, monkeypatch, old):
    if old:
        make_dataset(tmp_path / "shapes", **SMALL, seed=9)
    before = contents(tmp_path)
    drawn = []

    def interrupted(*args, **kwargs):
        drawn.append(args)
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return make_scene(*args, **kwargs)

    monkeypatch.setattr("shape_scenes.make_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_dataset(tmp_path / "shapes", **SMALL)
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == (["shapes"] if old else [])


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """As far as a limit on the size of files is one: the first image of 30 kB does not fit."""
    limit = (10_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    ran = subprocess.run(
        [sys.executable, SCRIPT, "--output", tmp_path / "shapes", "--train", "1", "--val", "0"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == f"{tmp_path / 'shapes'}: File too large"
    assert "Traceback" not in ran.stderr
    assert os.listdir(tmp_path) == []


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path, monkeypatch):
    child = os.fork()
    if child == 0:
        monkeypatch.setattr("shape_scenes.make_scene", lambda *_, **__: os.kill(os.getpid(), 9))
        make_dataset(tmp_path / "shapes", **SMALL)
    os.waitpid(child, 0)
    [left] = os.listdir(tmp_path)
    assert left != "shapes"
    mine = [".shapes.partial-x", ".draft.2024.tmp"]
    for name in mine:
        (tmp_path / name).mkdir()
    assert make_dataset(tmp_path / "shapes", **SMALL)
    assert sorted(os.listdir(tmp_path)) == sorted(["shapes", *mine])


def test_files_of_others_in_our_folder_are_not_lost(tmp_path):
    make_dataset(tmp_path / "shapes", **SMALL)
    (tmp_path / "shapes" / "subset.json").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(CascadeDetError, match=r"shapes: holds subset\.json, which was not made"):
        make_dataset(tmp_path / "shapes", **SMALL, seed=1)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["000004.jpg", "photo.jpg", "notes.txt"])
def test_images_of_others_among_the_drawn_ones_are_not_lost(tmp_path, name):
    make_dataset(tmp_path / "shapes", **SMALL)
    (tmp_path / "shapes" / "train" / name).write_text("mine")
    assert not make_dataset(tmp_path / "shapes", **SMALL)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"train/{name} in it was not made"):
        make_dataset(tmp_path / "shapes", **SMALL, seed=1)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("key", "value"), [("train", -1), ("width", 8), ("seed", -2), ("hard", 1.5), ("hard", -0.1)]
)
def test_a_bad_parameter_is_named(tmp_path, key, value):
    with pytest.raises(ValueError, match=f"{key} is {value}"):
        make_dataset(tmp_path / "shapes", **{**SMALL, key: value})
    assert os.listdir(tmp_path) == []


def test_the_command_line(tmp_path):
    command = [sys.executable, SCRIPT, "--output", tmp_path / "new" / "shapes", "--train", "1"]
    command += ["--val", "0", "--width", "64", "--height", "64"]
    said = [subprocess.run(command, capture_output=True, text=True, check=True).stdout]
    said.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert said[0].endswith("made\n")
    assert said[1].endswith("already there\n")
    wrong = subprocess.run([*command, "--hard", "2"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "hard is 2.0" in wrong.stderr

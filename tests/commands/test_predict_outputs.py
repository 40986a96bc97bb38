"""What predict writes beside the pictures, and which detections: crops, texts, csv, numbers."""

import csv
import json

import cv2
import numpy as np
import pytest
from PIL import Image

from cascade_det.commands import display, prediction
from cascade_det.commands.prediction_outputs import (
    Choice,
    MoreFiles,
    class_folders,
    class_indices,
)
from cascade_det.errors import ConfigError, DatasetError
from cascade_det.onnx_predictor import ArrayDetections
from cascade_det.streams.sources import find_sources

HOSTILE = ["cat", "../../up", "..", "a/b", "CAT", "=cmd()", "con\u00e9"]
FOUND = ArrayDetections(
    boxes=np.array(
        [[10, 20, 30, 40], [0, 0, 40, 10], [5.5, 6.5, 8, 9], [38, 58, 40, 60]], np.float32
    ),
    scores=np.array([0.9, 0.8, 0.6, 0.3], np.float32),
    classes=np.array([0, 1, 5, 0]),
    exit_stages=np.array([0, 1, 2, 2]),
)


class Finder:
    batch_size, class_names, category_ids = 2, HOSTILE, [11, 12, 13, 14, 15, 16, 17]

    def __call__(self, images, *, names):
        return [FOUND for _ in images]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with an image of 60 x 40 whose pixels say where they are."""
    monkeypatch.chdir(tmp_path)
    rows, columns = np.mgrid[:60, :40].astype(np.uint8)
    Image.fromarray(np.stack([rows, columns, 0 * rows], axis=2)).save("=a.png")
    return tmp_path


def run(**options):
    options = prediction.Options(
        Choice(**options.pop("choice", {})), MoreFiles(**options.pop("files", {})), **options
    )
    return prediction.predict(Finder(), find_sources(["=a.png"]), prediction.Path("out"), options)


def results(folder):
    return json.loads((folder / "out" / "predictions.json").read_text())


def all_files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_crops_are_the_pixels_of_boxes_and_stay_in_the_folder(folder):
    assert run(files={"crops": True}) == 0
    assert all_files(folder) == {
        *("=a.png", "out/=a.jpg", "out/predictions.json"),
        *("out/crops/cat/=a_0.jpg", "out/crops/_.._up/=a_1.jpg", "out/crops/_cmd()/=a_2.jpg"),
    }
    first = cv2.imread("out/crops/cat/=a_0.jpg")
    assert first.shape == (20, 20, 3)
    assert abs(int(first[0, 0, 2]) - 20) < 6  # row
    assert abs(int(first[0, 0, 1]) - 10) < 6  # column
    # Every pixel that the box touches.
    assert cv2.imread("out/crops/_cmd()/=a_2.jpg").shape == (3, 3, 3)


def test_folders_of_classes_differ_on_every_file_system():
    names = class_folders(HOSTILE)
    assert len({name.casefold() for name in names}) == len(HOSTILE)
    assert not any(name in ("", ".", "..") or set(name) & set("/\\\0") for name in names)
    assert class_folders(["x" * 300])[0].startswith("xxx")
    assert len(class_folders(["x" * 300])[0]) <= 255


def test_texts_are_in_the_format_of_yolo(folder):
    assert run(files={"texts": True}, choice={"score_threshold": 0.25}) == 0
    lines = [line.split() for line in (folder / "out/labels/=a.txt").read_text().splitlines()]
    assert [line[0] for line in lines] == ["0", "1", "5", "0"]
    numbers = np.array(lines, float)
    centres, sides = numbers[:, 1:3] * (40, 60), numbers[:, 3:5] * (40, 60)
    np.testing.assert_allclose(
        np.concatenate([centres - sides / 2, centres + sides / 2], axis=1), FOUND.boxes, atol=1e-4
    )
    np.testing.assert_allclose(numbers[:, 5], FOUND.scores, atol=1e-6)


def test_the_table_has_what_is_shown_and_computes_nothing(folder):
    assert run(files={"csv": True}) == 0
    with (folder / "out/predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score"]) for row in rows] == pytest.approx([0.9, 0.8, 0.6])
    assert [row["category_id"] for row in rows] == ["11", "12", "16"]
    assert (rows[0]["file_name"], rows[2]["class"]) == ("'=a.png", "'=cmd()")
    corners = [[float(row[k]) for k in ("x_min", "y_min", "x_max", "y_max")] for row in rows]
    np.testing.assert_allclose(corners, FOUND.boxes[:3])
    assert [row["exit_stage"] for row in rows] == ["0", "1", "2"]
    assert {(row["frame"], row["seconds"], row["track_id"]) for row in rows} == {("", "", "")}


def test_classes_and_the_most_of_an_image(folder):
    assert run(choice={"classes": frozenset([0, 5])}) == 0
    assert [a["category_id"] for a in results(folder)["annotations"]] == [11, 16, 11]
    assert run(choice={"classes": frozenset([0, 5]), "most": 2}) == 0
    assert [a["category_id"] for a in results(folder)["annotations"]] == [11, 16]
    assert class_indices(["../../up", "0", "cat"], HOSTILE) == {0, 1}
    # A name comes before a number.
    assert class_indices(["1"], ["a", "b", "1"]) == {2}
    for wrong in ("dog", "7", "-1", "\u0663"):
        with pytest.raises(ConfigError, match=r"there is no such class.*0 cat, 1 \.\./\.\./up"):
            class_indices([wrong], HOSTILE)


def test_files_of_an_earlier_run_go_and_those_of_others_stay(folder):
    files = {"texts": True, "crops": True, "csv": True}
    assert run(files=files) == 0
    stale = [folder / "out/labels/old.txt", folder / "out/crops/cat/old_0.jpg"]
    for path in (*stale, folder / "out/labels/notes.md"):
        path.write_text("x")
    assert run(files=files) == 0
    assert not any(path.exists() for path in stale)
    assert (folder / "out/labels/notes.md").exists()
    assert set(results(folder)["others"]) == {"labels", "crops", "predictions.csv"}
    # A folder that no run made.
    (folder / "out").rename(folder / "first")
    (folder / "out" / "labels").mkdir(parents=True)
    (folder / "out" / "labels" / "mine.txt").write_text("by hand")
    with pytest.raises(DatasetError, match="labels would be replaced"):
        run(files=files)
    assert (folder / "out" / "labels" / "mine.txt").exists()


def test_a_link_is_not_followed_out_of_the_folder(folder):
    assert run(files={"texts": True}) == 0
    (folder / "out" / "labels").rename(folder / "away")
    (folder / "out" / "labels").symlink_to("../away")
    with pytest.raises(DatasetError, match="is a link"):
        run(files={"texts": True})
    assert (folder / "away" / "=a.txt").exists()
    assert len(results(folder)["images"]) == 1


def test_a_link_in_the_crops_costs_no_file_behind_it(folder):
    assert run(files={"crops": True}) == 0
    (folder / "mine").mkdir()
    (folder / "mine" / "photo.jpg").write_text("mine")
    (folder / "out" / "crops" / "cat").rename(folder / "away")
    (folder / "out" / "crops" / "cat").symlink_to("../../mine")
    with pytest.raises(DatasetError, match="crops/cat: is a link"):
        run(files={"crops": True})
    assert [path.name for path in (folder / "mine").iterdir()] == ["photo.jpg"]


def test_a_window_needs_an_opencv_with_windows_and_a_display(monkeypatch, folder):
    built = "  GUI:                           {}\n    GTK+: NO\n"
    monkeypatch.setattr(display.cv2, "getBuildInformation", lambda: built.format("NONE"))
    with pytest.raises(ConfigError, match="pip install opencv-python"):
        display.check_display()
    monkeypatch.setattr(display.cv2, "getBuildInformation", lambda: built.format("GTK3"))
    monkeypatch.setattr(display.sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="neither DISPLAY nor WAYLAND_DISPLAY"):
        display.check_display()
    monkeypatch.setenv("DISPLAY", ":0")
    display.check_display()


def test_pictures_are_shown_until_a_key(monkeypatch, folder):
    shown, closed = [], []
    for number in range(9):
        Image.open("=a.png").save(f"{number}.png")
    monkeypatch.setattr(display.cv2, "imshow", lambda name, picture: shown.append(picture))
    monkeypatch.setattr(display.cv2, "waitKey", lambda _: ord("q") if shown else -1)
    monkeypatch.setattr(display.cv2, "destroyAllWindows", lambda: closed.append(True))
    names = [f"{number}.png" for number in range(9)]
    options = prediction.Options(show=True)
    assert prediction.predict(Finder(), find_sources(names), prediction.Path("out"), options) == 0
    assert closed == [True]
    if shown:
        assert shown[0].shape == (60, 40, 3)
        assert len(shown) == 1

"""Tables and pictures of an analysis, read back."""

from __future__ import annotations

import csv

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from cascade_det.errors import DatasetError
from cascade_det.evaluation import score_results
from cascade_det.evaluation.ground_truth import load_ground_truth, load_mask_truth
from cascade_det.report.analysis_files import write_analysis
from cascade_det.report.colors import GREEN, RED, YELLOW
from cascade_det.report.confusion_plot import plot_confusion
from cascade_det.report.mistakes import draw_mistakes
from cascade_det.report.text import format_report

FOUND, MISSED, WRONG = (40, 60, 80, 50), (150, 60, 60, 90), (220, 160, 70, 60)
GREY = 128


@pytest.fixture
def analysis(coco_content):
    content = coco_content([(1, 3, FOUND), (1, 7, MISSED), (2, 3, FOUND)])
    results = [
        {"image_id": 1, "category_id": 3, "bbox": list(FOUND), "score": 0.9},
        {"image_id": 1, "category_id": 3, "bbox": list(WRONG), "score": 0.75},
    ]
    return score_results(load_ground_truth(content), results, [1, 2])["analysis"]


def grey_image(_):
    return np.full((300, 400, 3), GREY, np.uint8)


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_tables_hold_the_figures(analysis, tmp_path):
    folder = write_analysis(analysis, tmp_path)
    assert folder == tmp_path / "analysis"
    headers, cat, dog = table(folder / "per_class.csv")
    cat, dog = (dict(zip(headers, row, strict=True)) for row in (cat, dog))
    assert (cat["class"], cat["category_id"], cat["objects"]) == ("cat", "3", "2")
    assert float(cat["AP50"]) == analysis["per_class"][0]["AP50"]
    assert (cat["true_positives"], cat["false_positives"], cat["misses"]) == ("1", "1", "1")
    assert (float(cat["precision"]), float(cat["best_precision"])) == (50, 100)
    assert float(cat["best_score"]) == 0.9
    # Nothing is detected as a dog: its precision is nan.
    assert (dog["precision"], float(dog["recall"])) == ("", 0)
    assert table(folder / "confusion_matrix.csv") == [
        ["true \\ detected", "cat", "dog", "background"],
        ["cat", "1", "0", "1"],
        ["dog", "0", "0", "1"],
        ["background", "1", "0", "0"],
    ]
    headers, *worst = table(folder / "worst_images.csv")
    assert headers[1:] == [
        "file_name", "true_positives", "false_positives", "misses", "F1", "picture"
    ]  # fmt: skip
    assert worst == [
        ["1", "1.jpg", "1", "1", "1", "50.0", ""],
        ["2", "2.jpg", "0", "0", "1", "0.0", ""],
    ]
    assert not (folder / "worst_images").exists()


def test_pictures_replace_those_of_the_last_time(analysis, tmp_path, caplog):
    asked = []

    def read(file_name):
        asked.append(file_name)
        return grey_image(file_name)

    def fail_for_the_second(file_name):
        if file_name == "2.jpg":
            raise DatasetError("2.jpg: there is no such image")
        return grey_image(file_name)

    folder = write_analysis(analysis, tmp_path, read_image=read)
    assert asked == ["1.jpg", "2.jpg"]
    pictures = folder / "worst_images"
    assert sorted(p.name for p in pictures.iterdir()) == ["01.jpg", "02.jpg"]
    assert cv2.imread(str(pictures / "01.jpg")).shape[1] == 400
    write_analysis(analysis, tmp_path, read_image=fail_for_the_second)
    assert [p.name for p in pictures.iterdir()] == ["01.jpg"]
    assert [row[-1] for row in table(folder / "worst_images.csv")[1:]] == [
        "worst_images/01.jpg",
        "",
    ]
    assert "02.jpg was not written: DatasetError: 2.jpg: there is no such image" in caplog.text


def test_mistakes_are_drawn_in_their_colours(analysis):
    image = grey_image("")
    picture = draw_mistakes(image, analysis["worst_images"][0])
    assert (image == GREY).all()
    legend = len(picture) - 300
    assert 40 < legend < 120
    drawn = picture[legend:]
    colors = {"found": GREEN, "missed": YELLOW, "false positive": RED}
    for kind, (x, y, w, h) in {"found": FOUND, "missed": MISSED, "false positive": WRONG}.items():
        color = list(colors[kind])
        # The lower halves of both sides: no label covers them.
        assert (drawn[y + h // 2 : y + h, x] == color).all(), kind
        assert (drawn[y + h // 2 : y + h, x + w] == color).all(), kind
        assert (drawn[y + 12 : y + h - 12, x + 12 : x + w - 12] == GREY).all(), kind
        assert (picture[:legend] == color).all(axis=2).sum() > 400, kind


def test_masks_are_filled_with_the_colours_of_their_kind(coco_content):
    maskless = (20, 180, 60, 60)
    content = coco_content([(1, 3, FOUND), (1, 7, MISSED), (1, 7, maskless)])
    for annotation, (x, y, w, h) in zip(content["annotations"], (FOUND, MISSED), strict=False):
        # The left half of the box.
        corners = [x, y, x + w / 2, y, x + w / 2, y + h, x, y + h]
        annotation["segmentation"] = [corners]
    wrong = np.zeros((300, 400), np.uint8, order="F")
    wrong[160:220, 220:255] = 1
    rle = coco_mask.encode(wrong)
    rle["counts"] = rle["counts"].decode()
    results = [
        {"image_id": 1, "category_id": 3, "bbox": list(FOUND), "score": 0.9},
        {"image_id": 1, "category_id": 3, "bbox": list(WRONG), "score": 0.75, "segmentation": rle},
    ]
    truth = load_mask_truth(content)
    scored = score_results(load_ground_truth(content), results, [1, 2], mask_truth=truth)
    (entry,) = scored["analysis"]["worst_images"]
    drawn = draw_mistakes(grey_image(""), entry)[-300:].astype(int)
    for color, (x, y, w, h) in ((GREEN, FOUND), (RED, WRONG), (YELLOW, MISSED)):
        left = drawn[y + h // 2 : y + h - 12, x + 3 : x + w // 2 - 3]
        right = drawn[y + h // 2 : y + h - 12, x + w // 2 + 3 : x + w - 3]
        assert (abs(left - (GREY + np.array(color)) // 2) <= 1).all()
        assert (right == GREY).all()
    assert (drawn[185:235, 25:75] == GREY).all()
    assert (drawn[210:239, 20] == YELLOW).all()


def test_small_images_are_enlarged_with_their_boxes():
    mask = np.zeros((96, 128), np.uint8, order="F")
    mask[30:40, 20:25] = 1
    box = {"kind": "missed", "class": "cat", "bbox": [10, 20, 30, 40]}
    box["segmentation"] = coco_mask.encode(mask)
    entry = {"file_name": "small.png", "F1": 0.0, "boxes": [box]}
    picture = draw_mistakes(np.full((96, 128, 3), GREY, np.uint8), entry)
    assert picture.shape[1] == 5 * 128
    drawn = picture[-5 * 96 :]
    assert (drawn[250, 50] == YELLOW).all()
    assert (drawn[300, 100:150] == YELLOW).all()
    assert (drawn[152:198, 102:123] == drawn[160, 110]).all()
    assert (drawn[160, 110] != GREY).any()
    assert (drawn[152:198, [95, 130]] == GREY).all()


@pytest.mark.parametrize("size", [1, 12, 40, 160])
def test_the_confusion_matrix_is_drawn_for_any_number_of_classes(size, tmp_path):
    counts = np.zeros((size + 1, size + 1), np.int64)
    counts[0, size // 2] = 10
    plot_confusion(
        [f"class ${i}$_" * 5 for i in range(size)] + ["background"], counts, tmp_path / "m.png"
    )
    picture = cv2.imread(str(tmp_path / "m.png"))
    assert min(picture.shape[:2]) > 400
    # Dark blue is the cell that holds its whole row, and the end of the colour bar on the right.
    dark = (picture[..., 0] > 90) & (picture[..., 0] < 130) & (picture[..., 2] < 20)
    rows, columns = np.nonzero(dark[:, : picture.shape[1] * 4 // 5])
    assert len(rows) > 20
    assert rows.max() < picture.shape[0] * 0.5
    # One cell and no more.
    assert np.ptp(rows) < picture.shape[0] / size
    assert np.ptp(columns) < picture.shape[1] / size


def test_what_cannot_be_written_is_told_and_the_rest_is_there(analysis, tmp_path, caplog):
    (tmp_path / "analysis" / "per_class.csv").mkdir(parents=True)
    (tmp_path / "analysis" / "worst_images").write_text("no folder")
    folder = write_analysis(analysis, tmp_path, read_image=grey_image)
    assert (folder / "confusion_matrix.png").is_file()
    assert [row[-1] for row in table(folder / "worst_images.csv")] == ["picture", "", ""]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3
    assert all("was not written: " in message for message in told)


NOT_UTF8 = "gr\udcf6\udcdfe.png"


def test_names_that_are_no_text(coco_content, tmp_path, caplog):
    content = coco_content([(1, 3, FOUND), (2, 7, MISSED)])
    content["images"][0]["file_name"] = NOT_UTF8
    content["images"][1]["file_name"] = "=cmd()\x1b[31m\n" + "x" * 5000
    content["categories"][0]["name"] = "\ud83d\u202e\x00"
    scored = score_results(load_ground_truth(content), [], [1, 2])
    folder = write_analysis(scored["analysis"], tmp_path, read_image=grey_image)
    assert not caplog.records
    assert len(list((folder / "worst_images").glob("*.jpg"))) == 2
    text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.csv"))
    assert "gr\\udcf6\\udcdfe.png" in text
    assert "'=cmd()\\x1b[31m\\x0axx" in text
    assert "\\ud83d\\u202e\\x00" in text
    report = format_report(scored)
    assert report.encode()
    assert not any(c in report for c in "\x1b\x00\u202e")
    assert max(map(len, report.splitlines())) < 300


@pytest.mark.parametrize("shape", [(20_000, 100, 3), (100, 20_000, 3), (3, 65_000, 3)])
def test_thin_images_are_drawn(analysis, tmp_path, caplog, shape):
    image = {**analysis["worst_images"][0], "boxes": [analysis["worst_images"][0]["boxes"][0]]}
    worst = {**analysis, "worst_images": [image]}
    write_analysis(worst, tmp_path, read_image=lambda _: np.full(shape, GREY, np.uint8))
    assert not caplog.records
    picture = cv2.imread(str(tmp_path / "analysis" / "worst_images" / "01.jpg"))
    assert picture.shape[1] == shape[1]
    assert picture.shape[0] > shape[0]


def test_an_image_beyond_what_a_jpeg_can_be_is_told(analysis, tmp_path, caplog):
    def read(name):
        return np.zeros((1, 65_501, 3), np.uint8) if name == "1.jpg" else grey_image(name)

    folder = write_analysis(analysis, tmp_path, read_image=read)
    assert [path.name for path in (folder / "worst_images").iterdir()] == ["02.jpg"]
    assert "01.jpg was not written: ValueError: a picture of 65,501 x" in caplog.text

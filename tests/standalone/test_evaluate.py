"""What an evaluation of a checkpoint checks, logs and writes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from coco_sets import damage, draw_noise, edit_json

from cascade_det.engine.hooks import scalars_of
from cascade_det.errors import DatasetError
from cascade_det.standalone import build_detector, evaluate, train


@pytest.fixture
def test_json(shapes, tmp_path):
    """A copy of the annotations of the test set, to be changed."""
    path = tmp_path / "test.json"
    path.write_text((shapes / "val.json").read_text())
    return path


@pytest.fixture
def cfg(instant_cfg, shapes, test_json, tmp_path):
    """Weights as they are initialised, and a test set at ``test_json``."""
    names = [category["name"] for category in json.loads(test_json.read_text())["categories"]]
    torch.manual_seed(0)
    weights = {
        "model": build_detector(instant_cfg).state_dict(),
        "run": {"seed": 1, "class_names": names, "category_ids": [1, 2, 3, 4, 5, 6]},
    }
    torch.save(weights, tmp_path / "weights.pth")
    instant_cfg.CASCADE.DATASETS = [("own", str(test_json), str(shapes / "val"))]
    instant_cfg.DATASETS.TEST = ("own",)
    instant_cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    return instant_cfg


def test_other_classes_than_the_trained_ones_are_refused(cfg, test_json):
    def swap(content):
        first, second, *_ = content["categories"]
        first["name"], second["name"] = second["name"], first["name"]

    names = [category["name"] for category in json.loads(test_json.read_text())["categories"]]
    edit_json(test_json, swap)
    swapped = [names[1], names[0], *names[2:]]
    with pytest.raises(DatasetError) as error:
        evaluate(cfg)
    assert f"test.json has the classes {', '.join(swapped)}" in str(error.value)
    assert f"trained on {', '.join(names)}" in str(error.value)


def test_weights_without_class_names_are_taken(cfg, tmp_path):
    content = torch.load(tmp_path / "weights.pth", weights_only=True)
    torch.save({"model": content["model"]}, tmp_path / "weights.pth")
    assert "AP" in evaluate(cfg)["bbox"]


def test_what_was_left_out_is_counted_in_the_notes(cfg, test_json):
    edit_json(test_json, lambda content: content["annotations"][0].update(category_id=77))
    cfg.CASCADE.ON_BAD_DATA = "skip"
    notes = evaluate(cfg)["notes"]
    assert "Left out as CASCADE.ON_BAD_DATA is 'skip': 1 x" in notes[-1]
    saved = json.loads((Path(cfg.OUTPUT_DIR) / "results.json").read_text())
    assert saved["notes"] == notes


def test_a_test_image_that_breaks_in_the_middle_is_found_before_the_run(
    cfg, test_json, shapes, tmp_path
):
    folder = tmp_path / "images"
    shutil.copytree(shapes / "val", folder)
    draw_noise(folder / "broken.png")
    damage(folder / "broken.png")
    images = json.loads(test_json.read_text())["images"]
    edit_json(test_json, lambda content: content["images"][1].update(file_name="broken.png"))
    cfg.CASCADE.DATASETS = [
        ("own", str(test_json), str(folder)),
        ("shapes_train", str(shapes / "train.json"), str(shapes / "train")),
    ]
    with pytest.raises(DatasetError, match=r"1 x image file that is truncated.*broken\.png"):
        train(cfg)
    assert os.listdir(cfg.OUTPUT_DIR) == [".cascade_det.lock"]
    cfg.CASCADE.ON_BAD_DATA = "skip"
    results = evaluate(cfg)
    assert "1 x image file that is truncated" in results["notes"][-1]
    detections = Path(cfg.OUTPUT_DIR, "inference", "coco_instances_results.json").read_text()
    found = {detection["image_id"] for detection in json.loads(detections)}
    assert found <= {image["id"] for image in images} - {images[1]["id"]}


def test_pictures_and_tables_are_extras(cfg, monkeypatch, caplog):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cascade_det.engine.evaluate.plot_report", no_space)
    monkeypatch.setattr("cascade_det.report.analysis_files.plot_confusion", no_space)
    monkeypatch.setattr("cascade_det.report.pages.evaluation.write_page", no_space)
    monkeypatch.setattr("cascade_det.report.analysis_files.write_csv", no_space)
    results = evaluate(cfg)
    assert json.loads((Path(cfg.OUTPUT_DIR) / "results.json").read_text())["bbox"].keys() == (
        results["bbox"].keys()
    )
    for name in (
        "report.png",
        "report.html",
        "per_class.csv",
        "confusion_matrix.png",
        "worst_images.csv",
    ):
        assert f"{name} was not written: OSError: [Errno 28] No space left" in caplog.text


def test_figures_are_no_extras(cfg, monkeypatch):
    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cascade_det.engine.evaluate.write_results", no_space)
    with pytest.raises(OSError, match="No space left"):
        evaluate(cfg)


def test_two_categories_of_one_name_have_figures_of_their_own(cfg, test_json, tmp_path):
    content = torch.load(tmp_path / "weights.pth", weights_only=True)
    torch.save({"model": content["model"]}, tmp_path / "weights.pth")
    edit_json(test_json, lambda content: content["categories"][1].update(name="circle"))
    edit_json(test_json, lambda content: content["categories"][0].update(name="circle"))
    results = evaluate(cfg)
    saved = json.loads((Path(cfg.OUTPUT_DIR) / "results.json").read_text())
    # What CASCADE.BEST_METRIC may name.
    scalars = dict(scalars_of(results))
    for name in ("AP-circle (id 1)", "AP-circle (id 2)"):
        assert name in saved["bbox"]
        assert f"bbox/{name}" in scalars
    assert "AP-circle" not in saved["bbox"]


def test_more_detections_count_where_the_detector_gives_more(cfg, test_json):
    def crowd(content):
        image = content["images"][0]["id"]
        first = next(a for a in content["annotations"] if a["image_id"] == image)
        content["annotations"] += [{**first, "id": 1000 + number} for number in range(150)]

    edit_json(test_json, crowd)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    limit = "TEST.DETECTIONS_PER_IMAGE"
    assert any("more than 100 objects" in note and limit in note for note in evaluate(cfg)["notes"])
    cfg.TEST.DETECTIONS_PER_IMAGE = 250
    assert not any(limit in note for note in evaluate(cfg)["notes"])


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ([], "float32"),
        (["ENABLED", True, "DTYPE", "bfloat16"], "bfloat16"),
        (
            ["ENABLED", True, "DTYPE", "bfloat16", "FLOAT32_PARTS", ("fpn", "stem")],
            "float32: stem, fpn; bfloat16: backbone, rpn, roi_heads",
        ),
    ],
)
def test_the_type_that_is_reported_is_the_one_that_ran(cfg, options, dtype, monkeypatch):
    monkeypatch.setattr("cascade_det.engine.evaluate.plot_report", lambda *_, **__: None)
    monkeypatch.setattr("cascade_det.engine.evaluate.write_analysis", lambda *_, **__: None)
    pairs = zip(options[::2], options[1::2], strict=True)
    cfg.merge_from_list([x for k, v in pairs for x in (f"MODEL.CASCADE.FAST.{k}", v)])
    evaluate(cfg)
    written = json.loads(Path(cfg.OUTPUT_DIR, "results.json").read_text())
    assert written["machine"]["dtype"] == dtype

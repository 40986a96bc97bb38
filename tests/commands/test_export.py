"""Weights to a file, and the file to the pictures and the json that the weights give."""

import json

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from small_detectors import random_image
from torch import nn

from cascade_det.commands import export, predict
from cascade_det.config import load_config
from cascade_det.standalone import build_detector

CONFIG = "configs/quick_schedules/instant_test.yaml"
CLASSES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def case(tmp_path_factory, request):
    """A folder with weights that tell objects apart, and images; and options."""
    folder = tmp_path_factory.mktemp("case")
    config = str(request.config.rootpath / CONFIG)
    options = ["MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.WEIGHTS", str(folder / "weights.pth")]
    options += ["MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"]
    options += ["MODEL.ROI_MASK_HEAD.NUM_CONV", "1", "MODEL.CASCADE.MASK.SCORE_THRESHOLD", "0.2"]
    torch.manual_seed(0)
    detector = build_detector(load_config([config], [*options, "MODEL.DEVICE", "cpu"]))
    head = detector.proposal_generator.rpn_head
    nn.init.normal_(head.objectness_logits.weight, std=0.5)
    for predictor in detector.roi_heads.box_predictor:
        nn.init.normal_(predictor.cls_score.weight, std=1.0)
        nn.init.normal_(predictor.bbox_pred.weight, std=0.3)
    nn.init.normal_(detector.roi_heads.mask_head.predictor.weight, std=1.0)
    run = {"class_names": CLASSES, "category_ids": [4, 5, 8]}
    torch.save({"model": detector.state_dict(), "run": run}, folder / "weights.pth")
    (folder / "images").mkdir()
    for number, size in enumerate([(70, 110), (150, 90), (64, 64)]):
        pixels = random_image(*size, seed=number).permute(1, 2, 0).numpy()
        cv2.imwrite(str(folder / "images" / f"{number}.png"), np.ascontiguousarray(pixels))
    return folder, config, options


def without_exits(options):
    return [*options, "MODEL.CASCADE.EXIT.ENABLED", "False"]


def test_the_file_predicts_what_the_weights_predict(case, tmp_path, capsys):
    folder, config, options = case
    file, images = tmp_path / "new" / "model.onnx", folder / "images"
    arguments = ["--config-file", config, "--output", str(file)]
    arguments += ["--image", str(images / "0.png"), "--opts", *without_exits(options)]
    assert export.main(arguments) == 0
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]
    printed = capsys.readouterr().out
    assert "model.onnx: 3 stages" in printed
    assert "Checked on an image of 101 x 64: " in printed
    assert "largest difference" in printed
    assert " in a mask" in printed
    assert "says little" not in printed

    shared = ["--input", str(images), "--score-threshold", "0.1", "--output"]
    assert predict.main(["--onnx", str(file), *shared, str(tmp_path / "file")]) == 0
    by_weights = [*shared, str(tmp_path / "weights"), "--opts", *without_exits(options)]
    assert predict.main(["--config-file", config, *by_weights]) == 0
    found, wanted = (
        json.loads((tmp_path / name / "predictions.json").read_text())
        for name in ("file", "weights")
    )
    found_boxes, wanted_boxes = (content.pop("annotations") for content in (found, wanted))
    assert found == wanted
    assert [category["name"] for category in found["categories"]] == CLASSES
    assert len(found_boxes) == len(wanted_boxes) > 10
    with_mask = 0
    for box, other in zip(found_boxes, wanted_boxes, strict=True):
        masks = [entry.pop("segmentation", None) for entry in (box, other)]
        assert (masks[0] is None) == (masks[1] is None) == (other["score"] < 0.2)
        for key in ("bbox", "score"):
            assert box.pop(key) == pytest.approx(other.pop(key), rel=1e-4, abs=1e-3)
        # A pixel on the edge may differ.
        assert box.pop("area") == pytest.approx(other.pop("area"), rel=1e-4, abs=2)
        if masks[0] is not None and coco_mask.area(masks[1]) > 30:
            assert coco_mask.iou(masks[:1], masks[1:], [0])[0, 0] > 0.9
            with_mask += 1
        assert box == other
    assert 0 < with_mask < len(wanted_boxes)
    for number in range(3):
        pictures = [
            cv2.imread(str(tmp_path / name / f"{number}.jpg")) for name in ("file", "weights")
        ]
        assert np.abs(pictures[0].astype(int) - pictures[1]).mean() < 0.5


@pytest.mark.parametrize(
    ("flags", "options", "words"),
    [
        ([], ["MODEL.CASCADE.EXIT.ENABLED", "True"], "--stages"),
        (["--stages", "7"], [], "--stages 7"),
        (["--stages", "1"], ["MODEL.WEIGHTS", "gone.pth"], "gone.pth"),
        (["--stages", "1", "--image", "gone.png"], [], "gone.png"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_written(case, tmp_path, capfd, flags, options, words):
    _, config, usual = case
    output = ["--output", str(tmp_path / "model.onnx")]
    arguments = ["--config-file", config, *output, *flags, "--opts", *usual, *options]
    assert export.main(arguments) == 1
    assert words in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_no_input_is_replaced_and_nothing_is_left_of_a_killed_export(case, tmp_path, capfd):
    folder, config, usual = case
    weights = (folder / "weights.pth").read_bytes()
    (tmp_path / "link").symlink_to(folder / "weights.pth")
    arguments = ["--config-file", config, "--stages", "1", "--image", str(folder / "images/0.png")]
    for output in (folder / "weights.pth", tmp_path / "link", folder / "images/0.png", config):
        assert export.main([*arguments, "--output", str(output), "--opts", *usual]) == 1
        assert "would replace" in capfd.readouterr().err
    assert (folder / "weights.pth").read_bytes() == weights
    left = tmp_path / ".cascade_det-0123456789abcdef.tmp"
    left.write_bytes(b"half a file")
    (tmp_path / ".draft.tmp").write_bytes(b"of somebody else")
    assert export.main([*arguments, "--output", str(tmp_path / "m.onnx"), "--opts", *usual]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "link", ".draft.tmp"}


def test_a_file_that_differs_is_told(case, tmp_path, capsys, monkeypatch):
    folder, config, options = case

    def export_nothing(detector, path, description):
        path.write_bytes(b"nothing")
        return lambda image: (torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))

    monkeypatch.setattr("cascade_det.standalone.export.export_onnx", export_nothing)
    (tmp_path / "model.onnx").write_bytes(b"an older file")
    arguments = ["--config-file", config, "--output", str(tmp_path / "model.onnx")]
    arguments += ["--image", str(folder / "images" / "0.png")]
    assert export.main([*arguments, "--stages", "2", "--opts", *options]) == 1
    printed = capsys.readouterr()
    assert "Exits are left out" in printed.out
    assert "not the same detections" in printed.err
    assert (tmp_path / "model.onnx").read_bytes() == b"an older file"


def test_predict_wants_a_configuration_or_a_file(capsys):
    for arguments, words in (
        ([], "--config-file --onnx is required"),
        (["--config-file", "a.yaml", "--onnx", "b"], "not allowed with"),
        (["--onnx", "b", "--opts", "A", "1"], "--opts change a configuration"),
    ):
        with pytest.raises(SystemExit):
            predict.main(["--input", "a", "--output", "b", *arguments])
        assert words in capsys.readouterr().err

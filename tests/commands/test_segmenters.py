"""What commands say to the configuration of a segmenter."""

import json

import pytest
import torch
from PIL import Image

from cascade_det.commands.main import main
from cascade_det.config import load_config
from cascade_det.errors import ConfigError
from cascade_det.standalone import build_detector
from cascade_det.standalone.build_segmenter import build_segmenter

SHAPES = ("--config-file", "cascade_det://quick_schedules/segment_shapes.yaml")


def test_no_detector_is_built_of_a_segmenter():
    with pytest.raises(ConfigError, match="'SemanticSegmentor', but this is for detectors"):
        build_detector(load_config([SHAPES[1]]))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of the shipped configuration that name no classes."""
    torch.manual_seed(0)
    segmenter = build_segmenter(load_config([SHAPES[1]]))
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": segmenter.state_dict()}, path)
    return path


def test_export_writes_the_whole_decoder(weights, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    options = ("MODEL.WEIGHTS", str(weights), "MODEL.CASCADE_DECODER.EXIT.ENABLED", "True")
    assert main(["export", *SHAPES, "--output", str(path), *options]) == 0
    said = capsys.readouterr().out
    assert "Exits are left out" in said
    assert "Checked on an image of 208 x 160: largest difference" in said
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    described = json.loads(session.get_modelmeta().custom_metadata_map["cascade_det"])
    assert described["class_names"][:2] == ["background", "circle"]
    assert (described["min_size"], described["max_size"]) == (160, 320)
    assert main(["export", *SHAPES, "--stages", "2", "--output", str(path), *options]) == 1
    assert "--stages is for detectors" in capsys.readouterr().err
    picture, output = tmp_path / "1.png", tmp_path / "out"
    Image.new("RGB", (8, 8)).save(picture)
    arguments = ("--onnx", str(path), "--input", str(picture), "--output", str(output))
    assert main(["predict", *arguments]) == 1
    assert "a segmenter, but this runs detectors" in capsys.readouterr().err


def test_a_file_that_differs_is_not_written(weights, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(
        "cascade_det.standalone.export_segmenter.export_onnx",
        lambda segmenter, path, description: lambda image: torch.zeros(7, *image.shape[1:]),
    )
    path = tmp_path / "model.onnx"
    options = ("MODEL.WEIGHTS", str(weights))
    assert main(["export", *SHAPES, "--output", str(path), *options]) == 1
    assert "not the same logits" in capsys.readouterr().err
    assert not path.exists()

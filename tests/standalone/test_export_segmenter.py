"""A file of a segmenter gives what the segmenter gives."""

import json

import numpy as np
import pytest
import torch
from small_segmenter import TRUNKS, make_segmenter

from cascade_det.errors import CheckpointError
from cascade_det.onnx_predictor import METADATA_KEY, OnnxPredictor
from cascade_det.standalone.export import METADATA_FILE
from cascade_det.standalone.export_segmenter import (
    SegmenterDescription,
    SegmenterFunction,
    compare,
    export_onnx,
    export_program,
)
from cascade_det.standalone.optimize import optimize_segmenter

# Multiples of no stride, of every stride, and fewer pixels than a stride.
SIZES = [(97, 130), (128, 64), (150, 71), (20, 9), (1, 1)]
DESCRIPTION = SegmenterDescription(["a", "b", "c"], "RGB", 352, 1024)
PVT = ("MODEL.BACKBONE.NAME", "build_pvtv2_backbone", "MODEL.PVTV2.NAME", "b0")


def random_image(height, width):
    """Values between whole numbers, as those of medical images."""
    return 255 * torch.rand(3, height, width)


def assert_same(run, segmenter, image):
    found = run(image)
    (wanted,) = segmenter.segment([{"image": image}]).sem_seg
    assert (found.dtype, found.shape) == (torch.float32, (3, *image.shape[1:]))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("trunk", ["mobilenet_v2", "pyramid", "pvtv2"])
def test_onnx_gives_the_logits_of_images_of_any_size(trunk, tmp_path):
    pytest.importorskip("onnxruntime")
    sizes = SIZES
    if trunk == "pvtv2":
        pytest.importorskip("timm")
        sizes = SIZES[:3]  # it takes 32 pixels and more
    segmenter = make_segmenter(*TRUNKS.get(trunk, PVT))
    run = export_onnx(segmenter, tmp_path / "file.onnx", DESCRIPTION)
    for size in sizes:
        assert_same(run, segmenter, random_image(*size))


def test_exits_are_left_out_and_the_file_says_what_it_is(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "file.onnx"
    exits = ("MODEL.CASCADE_DECODER.EXIT.ENABLED", True)
    segmenter = make_segmenter(*TRUNKS["mobilenet_v2"], *exits)
    run = export_onnx(segmenter, path, DESCRIPTION)
    segmenter.sem_seg_head.set_exits(None)
    assert_same(run, segmenter, random_image(70, 90))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map[METADATA_KEY]
    assert json.loads(metadata) == {
        "class_names": ["a", "b", "c"],
        "image_format": "RGB",
        "min_size": 352,
        "max_size": 1024,
    }
    image = np.zeros((3, 40, 50), np.float32)
    (logits,) = session.run(["sem_seg"], {"image": image})
    assert logits.shape == (3, 40, 50)
    with pytest.raises(CheckpointError, match="a segmenter, but this runs detectors"):
        OnnxPredictor(path)


@pytest.mark.slow
def test_program_gives_the_logits_of_images_of_any_size(tmp_path):
    segmenter = make_segmenter(*TRUNKS["mobilenet_v2"])
    export_program(segmenter, tmp_path / "file.pt2", DESCRIPTION)
    files = {METADATA_FILE: ""}
    run = torch.export.load(tmp_path / "file.pt2", extra_files=files).module()
    assert SegmenterDescription(**json.loads(files[METADATA_FILE])) == DESCRIPTION
    for size in [*SIZES[:3], (33, 40)]:
        assert_same(run, segmenter, random_image(*size))


def test_comparison_tells_other_logits():
    segmenter, image = make_segmenter(*TRUNKS["mobilenet_v2"]), random_image(40, 50)
    (logits,) = segmenter.segment([{"image": image}]).sem_seg
    assert compare(segmenter, lambda _: logits, image).same
    largest = float(logits.abs().max())
    one = logits.clone()
    one[1, 3, 4] += 0.01 * largest
    found = compare(segmenter, lambda _: one, image)
    assert found.difference == pytest.approx(0.01 * largest, rel=1e-3)
    assert not found.same
    other = compare(segmenter, lambda _: logits.roll(1, 0), image)
    expected = (logits.roll(1, 0).argmax(0) == logits.argmax(0)).double().mean()
    assert other.labels == pytest.approx(float(expected))
    assert not compare(segmenter, lambda _: logits[:, :-1], image).same


def test_an_optimised_segmenter_is_refused():
    fast = optimize_segmenter(make_segmenter(*TRUNKS["mobilenet_v2"]))
    with pytest.raises(ValueError, match="cannot be exported"):
        SegmenterFunction(fast)

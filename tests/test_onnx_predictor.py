"""Hostile and damaged ONNX files, and predictions without PyTorch."""

import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from cascade_det.errors import CheckpointError
from cascade_det.onnx_predictor import (
    METADATA_KEY,
    MOST_PIXELS,
    OUTPUTS,
    OUTPUTS_WITH_MASKS,
    ExportedModel,
    OnnxPredictor,
)

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parents[1]
MODEL = ExportedModel(["a", "b"], [3, 5], "RGB", 10, 20, 3)
IMAGE = np.full((40, 60, 3), 90, np.uint8)
GOOD = {
    "boxes": [[1.0, 1, 5, 5], [2, 2, 9, 9], [0, 0, 4, 4]],
    "scores": [1.0, 0.5, 0.0],
    "classes": [0, 1, 1],
}
MASKS = {**GOOD, "masks": np.linspace(0, 1, 3 * 4 * 4).reshape(3, 4, 4)}
TYPES = {"boxes": np.float32, "scores": np.float32, "classes": np.int64, "masks": np.float32}


def write(path, outputs=GOOD, metadata=None, nodes=(), initializers=()):
    """A file that gives the same whatever the image is."""
    helper, value = onnx.helper, onnx.helper.make_tensor_value_info
    nodes = list(nodes)
    for name, content in outputs.items():
        tensor = onnx.numpy_helper.from_array(np.array(content, TYPES[name]), name)
        nodes.append(helper.make_node("Constant", [], [name], value=tensor))
    kinds = {"boxes": 1, "scores": 1, "classes": 7, "masks": 1}
    names = OUTPUTS_WITH_MASKS if "masks" in outputs else OUTPUTS
    graph = helper.make_graph(
        nodes,
        "constant",
        [value("image", onnx.TensorProto.UINT8, [3, "h", "w"])],
        [value(name, kinds[name], None) for name in names],
        list(initializers),
    )
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, ir_version=8, opset_imports=opsets)
    text = MODEL.to_json() if metadata is None else metadata
    helper.set_model_props(model, {METADATA_KEY: text})
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "hostile.onnx"


def test_what_is_right_is_given(path):
    found = OnnxPredictor(write(path))(IMAGE)
    assert found.scores.tolist() == GOOD["scores"]
    assert found.classes.tolist() == GOOD["classes"]
    # Of an image of 15 x 10, as it is resized to.
    np.testing.assert_array_equal(found.boxes, np.array(GOOD["boxes"]) * 4)
    empty = {"boxes": np.zeros((0, 4)), "scores": [], "classes": []}
    assert len(OnnxPredictor(write(path, empty))(IMAGE)) == 0


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ({"scores": [np.nan, 0.5, 0.1]}, r"scores outside \[0, 1\]"),
        ({"scores": [7, 0.5, 0.1]}, r"scores outside \[0, 1\]"),
        ({"scores": [0.5, 0.1, -3]}, r"scores outside \[0, 1\]"),
        ({"scores": [np.inf, 0.5, 0.1]}, r"scores outside \[0, 1\]"),
        ({"scores": [0.5, 0.1, 0.9]}, "scores that are not in descending order"),
        ({"boxes": [[0, 0, np.nan, 1]] * 3}, "boxes that are not finite"),
        ({"boxes": [[0, 0, np.inf, 1]] * 3}, "boxes that are not finite"),
        ({"classes": [0, 1, 2]}, "classes that it does not name"),
        ({"classes": [0, -1, 1]}, "classes that it does not name"),
        ({"scores": [0.5, 0.1]}, r"scores of shape \[2\]"),
        ({"classes": [0, 1]}, r"classes of shape \[2\]"),
        ({"boxes": [[1, 2, 3]] * 3}, r"boxes of shape \[3, 3\]"),
        ({"scores": 0.5}, r"scores of shape \[\]"),
    ],
)
def test_outputs_are_not_believed(path, outputs, words):
    with pytest.raises(CheckpointError, match=rf"hostile\.onnx: .*{words}.*cascade-det export"):
        OnnxPredictor(write(path, {**GOOD, **outputs}))(IMAGE)


def test_masks_are_given_with_their_boxes(path):
    # The second box lies outside the image.
    boxes = [[1.0, 1, 5, 5], [20, 2, 29, 9], [0, 0, 4, 4]]
    found = OnnxPredictor(write(path, {**MASKS, "boxes": boxes}))(IMAGE)
    np.testing.assert_array_equal(found.masks, MASKS["masks"][[0, 2]].astype(np.float32))
    pasted = found.paste(40, 60)
    # All of the last mask is above the threshold, and none of the first.
    assert not pasted[0].any()
    assert pasted[1, 4:12, 4:12].all()
    assert not pasted[1, 17:].any()
    empty = {"boxes": np.zeros((0, 4)), "scores": [], "classes": [], "masks": np.zeros((0, 4, 4))}
    assert OnnxPredictor(write(path, empty))(IMAGE).paste(40, 60).shape == (0, 40, 60)
    with pytest.raises(ValueError, match="no masks"):
        OnnxPredictor(write(path))(IMAGE).paste(40, 60)


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        (np.full((3, 4, 4), np.nan), r"masks outside \[0, 1\]"),
        (np.full((3, 4, 4), np.inf), r"masks outside \[0, 1\]"),
        (np.full((3, 4, 4), -1e-3), r"masks outside \[0, 1\]"),
        (np.full((3, 4, 4), 3e38), r"masks outside \[0, 1\]"),
        (np.zeros((2, 4, 4)), r"masks of shape \[2, 4, 4\] for 3 boxes"),
        (np.zeros((3, 4, 5)), r"masks of shape \[3, 4, 5\] for 3 boxes"),
        (np.zeros((3, 0, 0)), r"masks of shape \[3, 0, 0\] for 3 boxes"),
        (np.zeros((3, 1025, 1025)), r"masks of shape \[3, 1025, 1025\] for 3 boxes"),
        (np.zeros((3, 16)), r"masks of shape \[3, 16\] for 3 boxes"),
        (0.5, r"masks of shape \[\] for 3 boxes"),
    ],
)
def test_masks_are_not_believed(path, masks, words):
    with pytest.raises(CheckpointError, match=rf"hostile\.onnx: .*{words}.*cascade-det export"):
        OnnxPredictor(write(path, {**GOOD, "masks": masks}))(IMAGE)


def test_boxes_beyond_all_numbers_end_at_the_image(path):
    largest = float(np.finfo(np.float32).max)
    far = {**GOOD, "boxes": [[-largest, -largest, largest, largest]] * 3}
    found = OnnxPredictor(write(path, far))(IMAGE)
    assert found.boxes.tolist() == [[0, 0, 60, 40]] * 3


def test_a_file_that_fails_is_named(path, capfd):
    shape = onnx.numpy_helper.from_array(np.array([7, 11]), "shape")
    evil = "\x1b[31m\u202e"
    reshape = onnx.helper.make_node("Reshape", ["image", "shape"], ["unused"], name=evil)
    size = onnx.helper.make_node("Size", ["unused"], ["size"])
    one = onnx.numpy_helper.from_array(np.array([1]), "one")
    classes = onnx.helper.make_node("Reshape", ["size", "one"], ["classes"])
    write(
        path,
        {k: GOOD[k] for k in ("boxes", "scores")},
        None,
        [reshape, size, classes],
        [shape, one],
    )
    fails = r"hostile\.onnx: fails on an image of 15 x 10 px"
    with pytest.raises(CheckpointError, match=fails) as error:
        OnnxPredictor(path)(np.zeros((20, 30, 3), np.uint8))
    assert r"\x1b[31m\u202e" in str(error.value)
    # Nothing of it reaches the terminal past this error.
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"min_size": 65_536, "max_size": 65_536}, "more than 67,108,864 pixels"),
        ({"min_size": 8193, "max_size": 8193}, "more than 67,108,864 pixels"),
        ({"max_size": 10**30}, "max_size is 1000000"),
        ({"class_names": ["a", "\x1b[2J"]}, "control characters"),
        ({"class_names": ["a", "x" * 300]}, "300 characters"),
        ({"class_names": ["a", "\ud800"]}, "not valid Unicode"),
        ({"class_names": ["a", " "]}, "empty"),
        ({"category_ids": [3, 3]}, "an id twice"),
        ({"category_ids": [3, 2**70]}, "64 bits"),
        ({"comment": "x" * 2**22}, "characters"),
        ({"class_names": "abc"}, "class_names is 'abc'"),
        ({"class_names": ["a", 2]}, "class_names is"),
        ({"class_names": ["a"]}, "class_names and category_ids"),
        ({"category_ids": [1, True]}, "category_ids is"),
        ({"image_format": "HSV"}, "image_format is 'HSV'"),
        ({"image_format": ["RGB"]}, "image_format is"),
        ({"min_size": -1}, "min_size is -1"),
        ({"min_size": True}, "min_size is True"),
        ({"max_size": 0}, "max_size is 0"),
        ({"max_size": "160"}, "max_size is '160'"),
        ({"num_stages": 0}, "num_stages is 0"),
    ],
)
def test_metadata_have_bounds(path, changes, words):
    text = json.dumps({**json.loads(MODEL.to_json()), **changes})
    with pytest.raises(CheckpointError, match=rf"hostile\.onnx: its metadata .*{words}") as error:
        OnnxPredictor(write(path, metadata=text))
    assert len(str(error.value)) < 1000
    assert str(error.value).isprintable()


def test_a_description_survives_its_text():
    assert ExportedModel.from_json(MODEL.to_json()) == MODEL
    for text in ("[]", "{}", "nothing"):
        with pytest.raises(ValueError):  # noqa: PT011
            ExportedModel.from_json(text)


def test_no_image_is_resized_beyond_the_bound(path):
    write(path, metadata=replace(MODEL, min_size=8192, max_size=8192).to_json())
    model = OnnxPredictor(path).model
    assert min(model.min_size, model.max_size) * model.max_size == MOST_PIXELS
    write(path, metadata=replace(MODEL, min_size=65_536, max_size=100).to_json())
    OnnxPredictor(path)(np.zeros((2, 1, 3), np.uint8))


@pytest.mark.parametrize("place", ["../secret", "link", "absolute"])
def test_a_file_reads_no_other_ones_outside_its_folder(tmp_path, place):
    (tmp_path / "secret").write_bytes(np.float32([1, 0.5, 0]).tobytes())
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to("../secret")
    scores = onnx.TensorProto(name="scores", data_type=1, dims=[3], data_location=1)
    location = str(tmp_path / "secret") if place == "absolute" else place
    for key, text in (("location", location), ("length", "12")):
        scores.external_data.add(key=key, value=text)
    rest = {key: GOOD[key] for key in ("boxes", "classes")}
    path = write(folder / "hostile.onnx", rest, initializers=[scores])
    with pytest.raises(CheckpointError, match=r"hostile\.onnx: onnxruntime cannot open it"):
        OnnxPredictor(path)


def test_a_pickled_predictor_opens_its_file_again(path, monkeypatch):
    write(path)
    monkeypatch.chdir(path.parent)
    pickled = pickle.dumps(OnnxPredictor(path.name))
    assert len(pickled) < 1000
    monkeypatch.chdir("/")
    found = pickle.loads(pickled)
    assert found(IMAGE).scores.tolist() == GOOD["scores"]
    assert found.class_names == MODEL.class_names
    path.unlink()
    with pytest.raises(CheckpointError, match=r"hostile\.onnx: there is no such file"):
        pickle.loads(pickled)


def test_threads_share_one(path):
    predictor = OnnxPredictor(write(path))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(predictor, [IMAGE] * 40))
    assert all(one.scores.tolist() == GOOD["scores"] for one in found)


@pytest.mark.parametrize("outputs", [GOOD, MASKS], ids=["boxes", "masks"])
def test_the_command_needs_no_torch(path, tmp_path, outputs):
    write(path, outputs)
    cv2.imwrite(str(tmp_path / "a.png"), IMAGE)
    program = (
        "import sys\n"
        "sys.modules['torch'] = None  # importing it fails\n"
        "import predict\n"
        "status = predict.main(sys.argv[1:])\n"
        "heavy = {'torchvision', 'pycocotools.coco', 'matplotlib', 'fvcore'} & sys.modules.keys()\n"
        "sys.exit(status or str(heavy))\n"
    )
    paths = [ROOT, ROOT / "tools"]
    output = tmp_path / "out"
    command = ["--onnx", path, "--input", tmp_path / "a.png", "--output", output]
    command += ["--txt", "--csv", "--save-crops", "--max-detections", "50"]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, command)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.endswith("set()\n"), done.stderr
    found = json.loads((output / "predictions.json").read_text())
    assert [entry["category_id"] for entry in found["annotations"]] == [3, 5, 5]
    areas = [entry["area"] for entry in found["annotations"]]
    if outputs is GOOD:
        assert areas == [256, 784, 256]
    else:
        # Of the first mask no cell reaches the threshold, and of the last all do.
        assert areas[0] == 0
        assert 200 < areas[2] < 256
    assert all(("segmentation" in entry) == (outputs is MASKS) for entry in found["annotations"])
    # A box was drawn.
    assert np.ptp(cv2.imread(str(output / "a.jpg"))) > 50

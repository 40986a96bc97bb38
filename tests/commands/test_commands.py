"""The commands as a user types them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from filelock import FileLock
from pycocotools.coco import COCO
from small_videos import make_video

import cascade_det.standalone
from cascade_det.commands import predict, train
from cascade_det.config import load_config
from cascade_det.engine import run_lock
from cascade_det.errors import ConfigError, DatasetError
from cascade_det.standalone import Predictor

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "quick_schedules" / "instant_test.yaml"
RUN = ["--host", "standalone", "--config-file", str(CONFIG)]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, shape_options):
    """A finished run of the smallest schedule: its folder, options and process."""
    output = tmp_path_factory.mktemp("trained")
    options = [*shape_options, "OUTPUT_DIR", str(output)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "train_net.py"), *RUN, *options],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return output, options, done


@pytest.fixture
def predicted(trained, tmp_path):
    """``predicted(inputs, *options)``: the status of the command, which writes to ``out``."""

    def run(inputs, *options):
        arguments = ["--config-file", CONFIG, "--output", tmp_path / "out", "--input", *inputs]
        weights = ["--opts", "MODEL.WEIGHTS", trained[0] / "model_final.pth"]
        return predict.main([str(word) for word in (*arguments, *weights, *options)])

    return run


def test_training_writes_config_log_and_tables(trained):
    output, _, done = trained
    log = (output / "log.txt").read_text()
    for words in ("Box AP", "If the cascade stopped after a stage", "Latency per image"):
        assert words in log
        assert words in done.stdout
    dumped = load_config(output / "config.yaml")
    assert str(output) == dumped.OUTPUT_DIR
    assert dumped.SOLVER.MAX_ITER == load_config(CONFIG).SOLVER.MAX_ITER


@pytest.mark.parametrize("more", [[], ["--resume"], ["--eval-only", "MODEL.WEIGHTS", "a.pth"]])
def test_a_folder_that_another_run_writes_to_is_left_alone(trained, monkeypatch, capfd, more):
    output, options, _ = trained
    monkeypatch.setattr(run_lock, "_PATIENCE", 0.1)
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
    with FileLock(output / ".cascade_det.lock"):
        assert train.main([*RUN, *more[:1], *options, *more[1:]]) == 1
    assert f"OUTPUT_DIR {output} is in use by another run" in "".join(capfd.readouterr())
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["SOLVER.MAX_ITR", "5"], ["SOLVER.MAX_ITR", "SOLVER.MAX_ITER"]),
        (["SOLVER.MAX_ITER", "many"], ["SOLVER.MAX_ITER", "many"]),
        (["MODEL.KEYPOINT_ON", "True"], ["MODEL.KEYPOINT_ON"]),
        (["--config-file", "no.yaml"], ["no.yaml"]),
        (["MODEL.WEIGHTS", "gone.pth"], ["gone.pth"]),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "3"], ["NUM_CLASSES", "6 categories"]),
    ],
)
def test_mistakes_end_with_a_clear_message(trained, tmp_path, capfd, arguments, words):
    _, options, _ = trained
    flags = arguments if arguments[0].startswith("--") else []
    keys = [] if flags else arguments
    keys = [*keys, "OUTPUT_DIR", str(tmp_path)]
    assert train.main([*RUN, *flags, *options, *keys]) == 1
    output = "".join(capfd.readouterr())
    assert all(word in output for word in words)


def test_predict_says_what_exits_lose(predicted, shapes, tmp_path, capsys):
    assert predicted([shapes / "val"], "CASCADE.SHADOW_SHARE", 1.0) == 0
    (line,) = (tmp_path / "out" / "metrics.json").read_text().splitlines()
    figures = json.loads(line)
    assert figures["shadow/images"] == figures["exits/images"] == figures["iteration"] == 3
    assert figures["shadow/loss_low"] <= figures["shadow/loss"] <= figures["shadow/loss_high"]
    printed = capsys.readouterr().out
    assert "Shadow runs: 3 images also ran the full cascade" in printed
    assert "Regions entering and leaving each stage" in printed


def test_predict_writes_pictures_and_coco_with_exit_stages(predicted, shapes, tmp_path):
    train = shapes / "train"
    inputs = [shapes / "val", train / "*1.jpg"]
    assert predicted(inputs, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0) == 0
    content = COCO(tmp_path / "out" / "predictions.json").dataset
    names = [image["file_name"] for image in content["images"]]
    assert names == [*map(str, sorted((shapes / "val").iterdir())), str(train / "000001.jpg")]
    assert len(list((tmp_path / "out").glob("*.jpg"))) == len(names)
    for image in content["images"]:
        assert cv2.imread(image["file_name"]).shape[:2] == (image["height"], image["width"])
    truth = json.loads((shapes / "val.json").read_text())
    assert content["categories"] == [
        {"id": c["id"], "name": c["name"]} for c in truth["categories"]
    ]
    assert content["annotations"]
    sizes = {image["id"]: image for image in content["images"]}
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        assert min(w, h) > 0
        assert x + w <= sizes[annotation["image_id"]]["width"] + 0.01
        assert y + h <= sizes[annotation["image_id"]]["height"] + 0.01
        assert annotation["exit_stage"] in (0, 1, 2)


def test_predictor_takes_arrays_and_paths_one_or_many(trained, shapes):
    cfg = load_config(
        CONFIG,
        [
            "MODEL.WEIGHTS",
            str(trained[0] / "model_final.pth"),
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
            0.0,
            "CASCADE.TEST_IMS_PER_BATCH",
            2,
        ],
    )
    predictor = Predictor(cfg)
    assert predictor.class_names == [
        c["name"] for c in json.loads((shapes / "val.json").read_text())["categories"]
    ]
    files = sorted((shapes / "train").iterdir())[:3]
    arrays = [cv2.imread(str(file)) for file in files]
    before = [array.copy() for array in arrays]
    many = predictor(arrays)
    assert len(many) == 3
    for array, old, file, detections in zip(arrays, before, files, many, strict=True):
        np.testing.assert_array_equal(array, old)
        for one in (predictor(array), predictor(file), predictor(str(file))):
            np.testing.assert_allclose(one.scores, detections.scores, atol=1e-4)
            np.testing.assert_allclose(one.boxes, detections.boxes, atol=1e-2)
    assert predictor([]) == []
    many[0].boxes[:] = 0  # plain tensors, not of inference mode
    for wrong in (np.zeros((5, 5), np.uint8), np.zeros((5, 5, 3), np.float32)):
        with pytest.raises(ValueError, match="uint8"):
            predictor(wrong)
    with pytest.raises(DatasetError, match="nowhere"):
        predictor("nowhere.jpg")
    cfg.MODEL.WEIGHTS = ""
    with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTS"):
        Predictor(cfg)


def test_a_stream_finds_what_calls_find(trained, shapes, tmp_path, caplog):
    pytest.importorskip("av")
    options = ["MODEL.WEIGHTS", str(trained[0] / "model_final.pth")]
    options += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "CASCADE.TEST_IMS_PER_BATCH", 2]
    predictor = Predictor(load_config(CONFIG, options))
    make_video(tmp_path / "a.mp4", frames=3)
    broken = tmp_path / "b.png"
    broken.write_bytes(b"no image")
    found = list(predictor.stream([shapes / "val", broken, tmp_path / "a.mp4"]))
    files = sorted((shapes / "val").iterdir())
    videos = [f"{tmp_path / 'a.mp4'}#{number}" for number in range(3)]
    assert [one.frame.name for one in found] == [*map(str, files), *videos]
    assert [one.frame.seconds for one in found[-3:]] == pytest.approx([0, 0.1, 0.2])
    assert "b.png: cannot be read as an image" in caplog.text
    for one in (found[0], found[-1]):
        alone = predictor(one.frame.pixels)
        np.testing.assert_allclose(one.scores, alone.scores, atol=1e-4)
        np.testing.assert_allclose(one.boxes, alone.boxes, atol=1e-2)
        assert one[:1].frame is one.to("cpu").frame is one.frame
    with pytest.raises(DatasetError, match="nowhere"):
        next(predictor.stream("nowhere"))


def test_one_broken_file_does_not_lose_the_others(predicted, shapes, tmp_path, capfd):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    whole = sorted((shapes / "train").iterdir())
    for name, content in {
        "a.jpg": whole[0].read_bytes(),
        "b.jpg": whole[0].read_bytes()[:500],
        "c.jpg": b"",
        "d.jpg": whole[1].read_bytes(),
        "e.jpg": b"<html>404</html>",
    }.items():
        (inputs / name).write_bytes(content)
    output = tmp_path / "out"
    options = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "CASCADE.TEST_IMS_PER_BATCH", 2]
    assert predicted([inputs], *options) == 1
    captured = capfd.readouterr()
    assert "2 images" in captured.out
    assert "3 files could not be read" in captured.err
    coco = COCO(output / "predictions.json")
    assert [(i["id"], Path(i["file_name"]).name) for i in coco.loadImgs(coco.getImgIds())] == [
        (1, "a.jpg"),
        (4, "d.jpg"),
    ]
    assert {a["image_id"] for a in coco.loadAnns(coco.getAnnIds())} == {1, 4}
    assert sorted(path.name for path in output.glob("*.jpg")) == ["a.jpg", "d.jpg"]
    failed = coco.dataset["failed"]
    assert [Path(failure["file_name"]).name for failure in failed] == ["b.jpg", "c.jpg", "e.jpg"]
    for failure in failed:
        assert f"{failure['file_name']}: {failure['reason']}" in captured.err
        assert failure["reason"]
        assert not failure["reason"].startswith("/")


def test_ctrl_c_while_the_weights_are_loaded(monkeypatch, tmp_path):
    def interrupted(cfg, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cascade_det.standalone, "Predictor", interrupted)
    arguments = ["--config-file", str(CONFIG), "--input", str(CONFIG), "--output", str(tmp_path)]
    assert predict.main(arguments) == 130

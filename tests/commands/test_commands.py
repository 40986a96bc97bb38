"""The commands as a user types them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from filelock import FileLock
from pycocotools.coco import COCO

import cascade_det.standalone
from cascade_det.commands import predict, prediction, train
from cascade_det.config import load_config
from cascade_det.core import Detections
from cascade_det.engine import run_lock
from cascade_det.errors import ConfigError, DatasetError
from cascade_det.standalone import Predictor
from make_shapes import make_dataset

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "quick_schedules" / "instant_test.yaml"
RUN = ["--host", "standalone", "--config-file", str(CONFIG)]


def run_tool(name, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run of the smallest schedule by the command itself."""
    folder = tmp_path_factory.mktemp("trained")
    make_dataset(folder / "shapes", train=4, val=2, width=128, height=96, hard=0.0)
    datasets = [
        (f"shapes_{s}", str(folder / f"shapes/{s}.json"), str(folder / f"shapes/{s}"))
        for s in ("train", "val")
    ]
    options = ["CASCADE.DATASETS", str(datasets), "OUTPUT_DIR", str(folder / "output")]
    done = run_tool("train_net.py", *RUN, *options)
    assert done.returncode == 0, done.stderr
    return folder, options, done


def test_training_writes_config_log_and_tables(trained):
    folder, _, done = trained
    log = (folder / "output" / "log.txt").read_text()
    for words in ("Box AP", "If the cascade stopped after a stage", "Latency per image"):
        assert words in log
        assert words in done.stdout
    dumped = load_config(folder / "output" / "config.yaml")
    assert str(folder / "output") == dumped.OUTPUT_DIR
    assert dumped.SOLVER.MAX_ITER == load_config(CONFIG).SOLVER.MAX_ITER


@pytest.mark.parametrize("more", [[], ["--resume"], ["--eval-only", "MODEL.WEIGHTS", "a.pth"]])
def test_a_folder_that_another_run_writes_to_is_left_alone(trained, monkeypatch, capfd, more):
    folder, options, _ = trained
    monkeypatch.setattr(run_lock, "_PATIENCE", 0.1)
    before = {p: p.stat().st_mtime_ns for p in (folder / "output").rglob("*")}
    with FileLock(folder / "output" / ".cascade_det.lock"):
        assert train.main([*RUN, *more[:1], *options, *more[1:]]) == 1
    assert f"OUTPUT_DIR {folder / 'output'} is in use by another run" in "".join(capfd.readouterr())
    assert {p: p.stat().st_mtime_ns for p in (folder / "output").rglob("*")} == before


def test_eval_only(trained):
    folder, options, _ = trained
    before = json.loads((folder / "output" / "results.json").read_text())
    weights = ["MODEL.WEIGHTS", str(folder / "output" / "model_final.pth")]
    assert train.main([*RUN, "--eval-only", *options, *weights]) == 0
    after = json.loads((folder / "output" / "results.json").read_text())
    assert after["bbox"] == before["bbox"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["SOLVER.MAX_ITR", "5"], ["SOLVER.MAX_ITR", "SOLVER.MAX_ITER"]),
        (["SOLVER.MAX_ITER", "many"], ["SOLVER.MAX_ITER", "many"]),
        (["MODEL.MASK_ON", "True"], ["MODEL.MASK_ON"]),
        (["--num-gpus", "0"], ["--num-gpus is 0"]),
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


def test_missing_config_file(tmp_path, capfd):
    assert train.main(["--config-file", str(tmp_path / "no.yaml")]) == 1
    assert "no.yaml" in "".join(capfd.readouterr())


@pytest.fixture(scope="session")
def predictions(trained, tmp_path_factory):
    folder, _, _ = trained
    output = tmp_path_factory.mktemp("pictures")
    arguments = ["--config-file", CONFIG, "--output", output]
    arguments += ["--input", folder / "shapes" / "val", folder / "shapes" / "train" / "*1.jpg"]
    arguments += ["--opts", "MODEL.WEIGHTS", folder / "output" / "model_final.pth"]
    arguments += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    assert predict.main([str(argument) for argument in arguments]) == 0
    return output


def test_predict_says_what_exits_lose(trained, tmp_path, capsys):
    folder, _, _ = trained
    arguments = ["--config-file", CONFIG, "--output", tmp_path]
    arguments += ["--input", folder / "shapes" / "val", "--opts", "CASCADE.SHADOW_SHARE", 1.0]
    arguments += ["MODEL.WEIGHTS", folder / "output" / "model_final.pth"]
    assert predict.main([str(argument) for argument in arguments]) == 0
    (line,) = (tmp_path / "metrics.json").read_text().splitlines()
    figures = json.loads(line)
    assert figures["shadow/images"] == figures["exits/images"] == figures["iteration"] == 2
    assert figures["shadow/loss_low"] <= figures["shadow/loss"] <= figures["shadow/loss_high"]
    printed = capsys.readouterr().out
    assert "Shadow runs: 2 images took the full cascade too" in printed
    assert "Regions entering and leaving each stage" in printed


def test_predict_takes_folders_and_globs(trained, predictions):
    folder, _, _ = trained
    coco = COCO(predictions / "predictions.json")
    names = [image["file_name"] for image in coco.dataset["images"]]
    inputs = [*sorted((folder / "shapes" / "val").iterdir())]
    inputs += sorted((folder / "shapes" / "train").glob("*1.jpg"))
    assert names == [str(p) for p in inputs]
    assert len(list(predictions.glob("*.jpg"))) == len(names)
    for image in coco.dataset["images"]:
        assert cv2.imread(image["file_name"]).shape[:2] == (image["height"], image["width"])


def test_predicted_json_is_coco_with_exit_stages(trained, predictions):
    folder, _, _ = trained
    content = json.loads((predictions / "predictions.json").read_text())
    ground_truth = json.loads((folder / "shapes" / "val.json").read_text())
    names = [(c["id"], c["name"]) for c in content["categories"]]
    assert names == [(c["id"], c["name"]) for c in ground_truth["categories"]]
    assert content["annotations"]
    sizes = {image["id"]: image for image in content["images"]}
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        assert w > 0
        assert h > 0
        assert x + w <= sizes[annotation["image_id"]]["width"] + 0.01
        assert y + h <= sizes[annotation["image_id"]]["height"] + 0.01
        assert annotation["exit_stage"] in (0, 1, 2)


@pytest.mark.parametrize("name", ["missing.jpg", "broken.jpg", "empty_folder"])
def test_predict_names_what_it_cannot_use(trained, tmp_path, capfd, name):
    folder, _, _ = trained
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "empty_folder").mkdir()
    weights = ["MODEL.WEIGHTS", str(folder / "output" / "model_final.pth")]
    arguments = ["--config-file", str(CONFIG), "--input", str(tmp_path / name)]
    arguments += ["--output", str(tmp_path / "out"), "--opts", *weights]
    assert predict.main(arguments) == 1
    assert name in capfd.readouterr().err


def test_predictor_takes_arrays_and_paths_one_or_many(trained):
    folder, _, _ = trained
    cfg = load_config(
        CONFIG,
        [
            *("MODEL.WEIGHTS", str(folder / "output" / "model_final.pth")),
            *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "CASCADE.TEST_IMS_PER_BATCH", 2),
        ],
    )
    predictor = Predictor(cfg)
    assert predictor.class_names == [
        c["name"] for c in json.loads((folder / "shapes" / "val.json").read_text())["categories"]
    ]
    files = sorted((folder / "shapes" / "train").iterdir())[:3]
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


def test_predict_does_not_replace_its_input(trained, tmp_path, capfd):
    folder, _, _ = trained
    photo = tmp_path / "photo.jpg"
    photo.write_bytes((folder / "shapes" / "val" / "000001.jpg").read_bytes())
    before = photo.read_bytes()
    arguments = ["--config-file", str(CONFIG), "--input", str(photo), "--output", str(tmp_path)]
    arguments += ["--opts", "MODEL.WEIGHTS", str(folder / "output" / "model_final.pth")]
    (tmp_path / "a.png").write_bytes(photo.read_bytes())
    arguments[3:4] = [str(tmp_path / "a.png"), str(photo)]
    assert predict.main(arguments) == 1
    assert "photo.jpg" in capfd.readouterr().err
    assert not (tmp_path / "a.jpg").exists()  # refused before anything is done
    assert photo.read_bytes() == before


def test_one_broken_file_does_not_lose_the_others(trained, tmp_path, capfd):
    folder, _, _ = trained
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    whole = sorted((folder / "shapes" / "train").iterdir())
    for name, content in {
        "a.jpg": whole[0].read_bytes(),
        "b.jpg": whole[0].read_bytes()[:500],
        "c.jpg": b"",
        "d.jpg": whole[1].read_bytes(),
        "e.jpg": b"<html>404</html>",
    }.items():
        (inputs / name).write_bytes(content)
    output = tmp_path / "out"
    arguments = ["--config-file", CONFIG, "--input", inputs, "--output", output, "--opts"]
    arguments += ["MODEL.WEIGHTS", folder / "output" / "model_final.pth"]
    arguments += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "CASCADE.TEST_IMS_PER_BATCH", 2]
    assert predict.main([str(argument) for argument in arguments]) == 1
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


class SlowPredictor:
    """Finds one box in every image, and is interrupted at the third batch."""

    batch_size = 2
    class_names = ("thing",)
    category_ids = (7,)

    def __init__(self):
        self.batches = 0

    def __call__(self, images, *, names):
        self.batches += 1
        if self.batches == 3:
            raise KeyboardInterrupt
        return [
            Detections(
                boxes=torch.tensor([[1.0, 2.0, 11.0, 22.0]]),
                scores=torch.tensor([0.75]),
                classes=torch.tensor([0]),
                exit_stages=torch.tensor([1]),
            )
            for _ in images
        ]


def test_ctrl_c_keeps_what_is_done(tmp_path, capfd):
    files = [tmp_path / f"{i}.png" for i in range(9)]
    for file in files:
        cv2.imwrite(str(file), np.full((40, 30, 3), 128, np.uint8))
    output = tmp_path / "out"
    assert prediction.predict(SlowPredictor(), files, output, 0.5) == 130
    assert "5 images are not done" in capfd.readouterr().err
    assert sorted(path.name for path in output.iterdir()) == [
        *(f"{i}.jpg" for i in range(4)),
        "predictions.json",
    ]
    content = json.loads((output / "predictions.json").read_text())
    assert [image["file_name"] for image in content["images"]] == [str(f) for f in files[:4]]
    assert content["annotations"][3] == {
        **{"id": 4, "image_id": 4, "category_id": 7, "bbox": [1.0, 2.0, 10.0, 20.0]},
        **{"score": 0.75, "exit_stage": 1, "area": 200.0, "iscrowd": 0},
    }
    assert content["failed"] == []


def test_ctrl_c_while_the_weights_are_loaded(monkeypatch, tmp_path):
    def interrupted(cfg, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cascade_det.standalone, "Predictor", interrupted)
    arguments = ["--config-file", str(CONFIG), "--input", str(CONFIG), "--output", str(tmp_path)]
    assert predict.main(arguments) == 130


def test_an_output_that_cannot_be_written(trained, tmp_path, capfd):
    folder, _, _ = trained
    (tmp_path / "file").write_text("")
    arguments = ["--config-file", str(CONFIG), "--input", str(folder / "shapes" / "val")]
    arguments += ["--output", str(tmp_path / "file" / "out")]
    arguments += ["--opts", "MODEL.WEIGHTS", str(folder / "output" / "model_final.pth")]
    assert predict.main(arguments) == 1
    assert "file" in capfd.readouterr().err

"""Training and evaluation of a segmenter on drawn scenes: learning, resuming, and mistakes."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from shape_runs import assert_same
from small_segmenter import CLASSES, squares_run, write_squares

from cascade_det.config import get_cfg
from cascade_det.data.semantic import read_labels
from cascade_det.engine.semantic_datasets import load_semantic_datasets
from cascade_det.errors import CheckpointError, ConfigError, DatasetError
from cascade_det.standalone import host


@pytest.fixture
def folder(tmp_path):
    write_squares(tmp_path)
    return tmp_path


@pytest.fixture
def cfg(folder):
    cfg = get_cfg()
    cfg.merge_from_list([*squares_run(folder), "MODEL.DUAL_SCALE.SIZES", [48, 40]])
    return cfg


def test_training_learns(cfg, folder, caplog):
    caplog.set_level("INFO")
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.SOLVER.MAX_ITER = 30
    metrics = host.train(cfg)["sem_seg"]
    assert metrics["mIoU"] > 50  # one class everywhere: about 20
    written = json.loads((folder / "output" / "results.json").read_text())
    assert written["sem_seg"]["IoU-bright"] == pytest.approx(metrics["IoU-bright"])
    check_pictures(folder / "output", metrics)
    # The same from the file of weights.
    cfg.MODEL.WEIGHTS = str(folder / "output" / "model_final.pth")
    cfg.OUTPUT_DIR = str(folder / "again")
    assert host.evaluate(cfg)["sem_seg"] == pytest.approx(metrics)
    cfg.MODEL.CASCADE.FAST.ENABLED = True
    assert host.evaluate(cfg)["sem_seg"] == pytest.approx(metrics, abs=0.05)
    assert "Optimised for inference" in caplog.text


def check_pictures(output, metrics):
    """Of the six images, and the tables beside them."""
    assert Image.open(output / "report.png").width > 1000
    page = (output / "report.html").read_text()
    assert page.count("<img ") == 6
    assert all(name in page for name in CLASSES)
    analysis = output / "analysis"
    assert Image.open(analysis / "confusion_matrix.png").width > 300
    with (analysis / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == CLASSES
    labels = [np.asarray(Image.open(output.parent / "labels" / f"{i}.png")) for i in range(6)]
    assert [int(row["pixels"]) for row in rows] == np.bincount(np.ravel(labels)).tolist()
    assert float(rows[1]["IoU"]) == pytest.approx(metrics["IoU-bright"])
    with (analysis / "worst_images.csv").open() as file:
        worst = list(csv.DictReader(file))
    assert sorted(row["image_id"] for row in worst) == list("012345")
    assert [float(row["mIoU"]) for row in worst] == sorted(float(row["mIoU"]) for row in worst)
    for row in worst:
        # Truth and prediction side by side, enlarged.
        assert Image.open(analysis / row["picture"]).width == 2 * 10 * 64 + 4


def test_metrics_are_of_the_labels_in_the_files(cfg, folder):
    """Counted by hand, from the scores of a segmenter that was hardly trained."""
    cfg.MODEL.DUAL_SCALE.MODE = "parallel"
    cfg.DATASETS.TRAIN = ("squares",)
    host.train(cfg)
    cfg.MODEL.WEIGHTS = str(folder / "output" / "model_final.pth")
    cfg.OUTPUT_DIR = str(folder / "again")
    found = host.evaluate(cfg)["sem_seg"]
    from cascade_det.engine.semantic_datasets import semantic_test_loader
    from cascade_det.standalone.build_segmenter import build_segmenter

    (dataset,) = load_semantic_datasets(cfg, train=False)
    segmenter = build_segmenter(cfg)
    segmenter.load_state_dict(torch.load(cfg.MODEL.WEIGHTS, weights_only=True)["model"])
    right = total = 0
    for (sample,) in semantic_test_loader(cfg, dataset):
        scores = segmenter.segment([sample]).sem_seg[0]
        truth = read_labels(dataset.records[sample["image_id"]])
        right += int((scores.argmax(0).numpy() == truth).sum())
        total += truth.size
    assert found["pACC"] == pytest.approx(100 * right / total)


@pytest.mark.parametrize("scales", ["off", "cascaded"])
def test_a_resumed_run_is_the_same_run(cfg, folder, scales):
    cfg.MODEL.DUAL_SCALE.MODE = scales
    cfg.SOLVER.MAX_ITER = 4
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    cfg.DATASETS.TEST = ()
    host.train(cfg)
    output = folder / "output"
    wanted = torch.load(output / "model_final.pth", weights_only=True)["model"]
    (output / "model_final.pth").unlink()
    (output / "last_checkpoint").write_text("model_0000001.pth")
    torch.manual_seed(7)
    host.train(cfg, resume=True)
    assert_same(torch.load(output / "model_final.pth", weights_only=True)["model"], wanted)


def test_mistakes_are_named_at_the_start(cfg, folder):
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 4
    with pytest.raises(ConfigError, match=r"NUM_CLASSES is 4.*'squares' has 3 classes"):
        host.train(cfg)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTS is empty"):
        host.evaluate(cfg)
    with pytest.raises(ConfigError, match="for detectors"):
        host.open_detector(cfg)
    cfg.MODEL.DUAL_SCALE.MODE = "parallel"
    with pytest.raises(ConfigError, match="one scale"):
        host.open_segmenter(cfg)
    cfg.MODEL.DUAL_SCALE.MODE = "off"
    (folder / "labels" / "3.png").unlink()
    with pytest.raises(DatasetError, match=r"3\.png"):
        host.train(cfg)


def test_weights_of_other_classes_are_refused(cfg, folder):
    cfg.DATASETS.TEST = ()
    host.train(cfg)
    cfg.MODEL.WEIGHTS = str(folder / "output" / "model_final.pth")
    cfg.DATASETS.TEST = ("squares",)
    cfg.OUTPUT_DIR = str(folder / "again")
    cfg.CASCADE.SEMANTIC_CLASSES = ["background", "dark", "bright"]
    with pytest.raises(DatasetError, match=r"classes background, dark, bright .*by label"):
        host.evaluate(cfg)
    cfg.CASCADE.SEMANTIC_CLASSES = CLASSES
    cfg.MODEL.CASCADE_DECODER.FUSE = "concat"
    with pytest.raises(CheckpointError):
        host.evaluate(cfg)

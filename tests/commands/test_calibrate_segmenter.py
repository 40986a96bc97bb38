"""The command on a segmenter: from weights and images to exits that load."""

import csv
import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from small_segmenter import SEGMENTER

from cascade_det.commands import calibrate
from cascade_det.config import get_cfg, load_config, segmenter_arguments
from cascade_det.standalone.build_segmenter import build_segmenter

FILES = [
    *("calibration.json", "comparison.csv", "comparison.png", "exits.yaml", "report.html"),
    "trials.csv",
]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Options of a run on six images, and a folder."""
    folder = tmp_path_factory.mktemp("segmenter")
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for index in range(6):
        image = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{index}.png")
        labels = rng.integers(0, 3, (64, 96), dtype=np.uint8)
        Image.fromarray(labels).save(folder / "labels" / f"{index}.png")
    options = [
        *SEGMENTER,
        *("MODEL.BACKBONE.NAME", "build_mobilenet_v2_backbone", "INPUT.MIN_SIZE_TEST", 64),
        *("DATASETS.TEST", ("noise",), "DATALOADER.NUM_WORKERS", 0),
        "CASCADE.SEMANTIC_DATASETS",
        [["noise", "folders", str(folder / "images"), str(folder / "labels")]],
        *("CASCADE.SEMANTIC_CLASSES", ["a", "b", "c"], "CASCADE.BEST_METRIC", "sem_seg/mIoU"),
        *("MODEL.WEIGHTS", str(folder / "weights.pth")),
    ]
    cfg = get_cfg()
    cfg.merge_from_list(options)
    torch.manual_seed(0)
    torch.save({"model": build_segmenter(cfg).state_dict()}, folder / "weights.pth")
    with (folder / "model.yaml").open("w") as file:
        file.write(cfg.dump())
    return folder


def run(case, output, *arguments):
    config = ["--host", "standalone", "--config-file", str(case / "model.yaml")]
    return calibrate.main([*config, "--output", str(output), "--trials", "60", *arguments])


@pytest.mark.parametrize(
    "target",
    [
        ["--max-drop", "80", "--metric", "sem_seg/Dice"],
        ["--latency-ms", "100000"],
        ["--exit-rate", "0.1"],
        ["--risk", "0.9", "--delta", "0.5"],
    ],
)
def test_every_target_gives_exits_that_load(case, tmp_path, target):
    output = tmp_path / "exits"
    assert run(case, output, *target) == 0
    assert sorted(path.name for path in output.iterdir() if path.name != "log.txt") == FILES
    content = json.loads((output / "calibration.json").read_text())
    assert content["images"] == {"chosen_on": 3, "reported_on": 3}
    found = yaml.safe_load((output / "exits.yaml").read_text())
    assert found["MODEL"]["CASCADE_DECODER"]["EXIT"]["ENABLED"] == bool(content["setting"])
    cfg = load_config([str(case / "model.yaml"), str(output / "exits.yaml")], [])
    arguments = segmenter_arguments(cfg)["head"]["exits"]
    if content["setting"]:
        assert {name: arguments[name] for name in content["setting"]} == content["setting"]
    with (output / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["decoder"] == "no exits"
    assert rows[-1]["decoder"] == "oracle of patches"
    (chosen,) = [row for row in rows if row["chosen"] == "1"]
    assert chosen["decoder"] == content["expected"]["decoder"]
    assert len((output / "trials.csv").read_text().splitlines()) == 61


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-drop", "1", "--metric", "bbox/AP"], "--metric is bbox/AP, but the model is a seg"),
        (["--max-drop", "1", "--images", "3"], "--images is 3: give 4 or more"),
        (["--risk", "0.01"], "at least 230 images are needed"),
        (["--max-drop", "1", "--loss", "masks"], "--loss masks is for detectors"),
        (["--max-drop", "1", "--score-threshold", "0.5"], "--score-threshold is for detectors"),
        (["--latency-ms", "0.001"], "no setting that was run reaches it"),
    ],
)
def test_mistakes(case, tmp_path, capsys, arguments, message):
    assert run(case, tmp_path / "exits", *arguments) != 0
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "exits" / "exits.yaml").exists()


def test_labels_without_a_class_that_counts(case, tmp_path, capsys):
    labels = tmp_path / "labels"
    labels.mkdir()
    for index in range(6):
        Image.fromarray(np.zeros((64, 96), np.uint8)).save(labels / f"{index}.png")
    data = str([["noise", "folders", str(case / "images"), str(labels)]])
    target = ["--max-drop", "1", "--metric", "sem_seg/Dice"]
    assert run(case, tmp_path / "exits", *target, "CASCADE.SEMANTIC_DATASETS", data) == 1
    assert "no pixels of the classes that Dice counts" in capsys.readouterr().err


def test_one_class_is_always_certain(case, tmp_path, capsys):
    keys = ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "1", "CASCADE.SEMANTIC_CLASSES", "['a']")
    assert run(case, tmp_path / "exits", "--max-drop", "1", *keys) == 1
    assert "a single class is always certain" in capsys.readouterr().err

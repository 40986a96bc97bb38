"""The facade: detectors opened by name, trained further, evaluated, saved and shared."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hub_server import hub
from shape_runs import INSTANT

from cascade_det import CascadeDetector, config
from cascade_det.errors import CheckpointError, ConfigError, DatasetError, DownloadError
from cascade_det.facade.given_data import class_names_of, source_of, with_data
from cascade_det.facade.pretrained import open_folder
from cascade_det.standalone import Predictor, SlicedPredictor
from cascade_det.standalone import train as train_run
from shape_scenes import CLASSES

ROOT = Path(__file__).resolve().parents[2]
ZOO = "quick_schedules/instant_test.yaml"
SHORT = ["SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 2, "DATALOADER.NUM_WORKERS", 0]
# Scores of two iterations are low.
ALL_SCORES = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]


@pytest.fixture(scope="module")
def fitted(shapes, tmp_path_factory):
    """A detector after two iterations on the shapes, and the folder of its run."""
    folder = tmp_path_factory.mktemp("fitted") / "run"
    detector = CascadeDetector.from_pretrained(ZOO, opts=ALL_SCORES)
    detector.fit((shapes / "train.json", shapes / "train"), output_dir=folder, opts=SHORT)
    return detector, folder


@pytest.fixture(scope="module")
def saved(fitted, tmp_path_factory):
    """The folder of ``save_pretrained``; not to be changed."""
    pytest.importorskip("safetensors")
    folder = tmp_path_factory.mktemp("saved") / "shapes"
    fitted[0].save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of that folder."""
    return Path(shutil.copytree(saved, tmp_path / "copied"))


@pytest.fixture(scope="module")
def images(shapes):
    return sorted(map(str, (shapes / "val").iterdir()))


def assert_same(found, expected):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        for name in ("boxes", "scores", "classes", "exit_stages"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert any(len(detections) for detections in expected)


def test_the_package_loads_no_torch_until_the_facade_is_asked_for():
    program = (
        "import sys, cascade_det\n"
        "assert 'CascadeDetector' in cascade_det.__all__\n"
        "print(sorted({'torch', 'fvcore', 'numpy', 'cascade_det.facade'} & set(sys.modules)))\n"
        "cascade_det.Detector\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stdout == "[]\n"
    assert "has no attribute 'Detector'" in result.stderr


def test_it_detects_as_the_predictor_does(fitted, images):
    detector, folder = fitted
    keys = ["MODEL.WEIGHTS", str(folder / "model_final.pth"), *ALL_SCORES]
    predictor = Predictor(config.load_config(folder / "config.yaml", keys))
    assert_same(detector.predict(images), predictor(images))
    assert_same([detector.predict(images[0])], [predictor(images[0])])
    assert_same(
        detector.predict(images, slice_size=64, overlap=0.1),
        SlicedPredictor(predictor, size=64, overlap=0.1)(images),
    )
    assert detector.class_names == list(CLASSES)
    assert detector.category_ids == [1, 2, 3, 4, 5, 6]


def test_every_way_of_opening_gives_the_same_detector(fitted, saved, images):
    detector, folder = fitted
    expected = detector.predict(images)
    for name in (folder, folder / "model_final.pth", str(saved), saved / "model.safetensors"):
        opened = CascadeDetector.from_pretrained(name)
        assert_same(opened.predict(images), expected)
        assert opened.class_names == detector.class_names
        assert opened.category_ids == detector.category_ids


def test_fit_is_the_training_of_the_command(fitted, shapes, shape_options, tmp_path):
    keys = [*shape_options, *ALL_SCORES, *SHORT, "DATASETS.TEST", "()"]
    cfg = config.load_config(INSTANT, [*keys, "OUTPUT_DIR", str(tmp_path / "own")])
    train_run(cfg)
    found, expected = (
        torch.load(folder / "model_final.pth", weights_only=True)["model"]
        for folder in (fitted[1], tmp_path / "own")
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_fit_on_yolo_with_fewer_classes_then_evaluate(saved, tmp_path, images, no_pictures):
    """From the held weights; what depends on the number of classes starts anew."""
    yolo = tmp_path / "yolo"
    for split in ("images", "labels"):
        (yolo / split).mkdir(parents=True)
    for number, image in enumerate(images):
        shutil.copy(image, yolo / "images" / f"{number}.jpg")
        (yolo / "labels" / f"{number}.txt").write_text(f"{number % 2} 0.5 0.5 0.4 0.6\n")
    (yolo / "data.yaml").write_text(yaml.safe_dump({"names": ["cat", "dog"]}))
    detector = CascadeDetector.from_pretrained(saved)
    before = detector.open().detector.state_dict()
    # With a rate of almost nothing, only what does not fit can differ.
    still = ["SOLVER.BASE_LR", 1e-12, "SOLVER.WEIGHT_DECAY", 0.0]
    result = detector.fit(
        yolo / "data.yaml",
        validation=(yolo / "data.yaml", yolo / "images"),
        output_dir=tmp_path / "run",
        epochs=1,
        opts=[*SHORT[4:], *still],
    )
    assert result is detector
    assert detector.class_names == ["cat", "dog"]
    assert detector.cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    assert set(detector.results) >= {"bbox", "stages"}
    after = detector.open().detector.state_dict()
    changed = {n for n, v in after.items() if v.shape != before[n].shape}
    assert changed == {n for n in after if "cls_score" in n}
    name = "backbone.fpn_lateral2.weight"
    torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=0)
    found = detector.evaluate(yolo / "data.yaml", opts=SHORT[4:])
    assert found["bbox"]["AP"] == pytest.approx(detector.results["bbox"]["AP"])
    assert set(found["bbox"]) >= {"AP", "AP50", "AP75"}
    assert not Path("output").exists()
    # Without validation data the last weights count, not the best ones of the run before.
    detector.fit(
        yolo / "data.yaml", output_dir=tmp_path / "run", epochs=2, resume=True, opts=SHORT[4:]
    )
    assert Path(detector.cfg.MODEL.WEIGHTS) == tmp_path / "run" / "model_final.pth"


def test_saved_configurations_name_nothing_local(fitted, saved, shapes):
    detector, folder = fitted
    assert "shapes_train" not in (saved / "config.yaml").read_text()
    for name in (str(shapes), str(folder), "model_final"):
        assert name not in (saved / "config.yaml").read_text()
    assert config.load_config(saved / "config.yaml").SOLVER == detector.cfg.SOLVER


def test_what_belongs_to_another_machine_is_dropped(copied, tmp_path):
    cfg = config.load_config(copied / "config.yaml")
    values = {
        "MODEL.DEVICE": "cuda:7",
        "MODEL.WEIGHTS": "http://127.0.0.1:9/w.pth",
        "MODEL.CASCADE.FAST.DTYPE": "int8",
        "MODEL.CASCADE.FAST.IMAGES": 3,
        "DATASETS.TRAIN": ("secret",),
        "DATASETS.TEST": ("secret",),
        "DATALOADER.NUM_WORKERS": 5000,
        "OUTPUT_DIR": str(tmp_path / "written"),
        "CASCADE.DATASETS": (("secret", "/etc/passwd", "/"),),
        "CASCADE.FOLLOW_LINKS": "all",
        "CASCADE.LOGGERS": ("wandb",),
        "SOLVER.MAX_ITER": 77,
    }
    hostile = config.changed(cfg, *(item for pair in values.items() for item in pair))
    (copied / "config.yaml").write_text(hostile.dump())
    opened = CascadeDetector.from_pretrained(copied).cfg
    defaults = config.flat(config.get_cfg())
    for key in values.keys() - {"MODEL.DEVICE", "MODEL.WEIGHTS", "SOLVER.MAX_ITER"}:
        found = config.flat(opened)[key]
        assert found == ("auto" if key.endswith("DTYPE") else defaults[key]) or (
            key == "DATALOADER.NUM_WORKERS" and found <= defaults[key]
        ), key
    model = opened.MODEL
    assert ("cuda" if torch.cuda.is_available() else "cpu") == model.DEVICE
    assert str(copied / "model.safetensors") == model.WEIGHTS
    assert opened.SOLVER.MAX_ITER == 77
    assert not (tmp_path / "written").exists()


class Calls:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_downloaded_files_are_data(copied, tmp_path):
    """Whatever a repository holds, safetensors are read and nothing is run or included."""
    target = tmp_path / "ran"
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(f"_BASE_: {tmp_path / 'other.yaml'}\n{text}")
    with pytest.raises(ConfigError, match="_BASE_, which is not followed"):
        open_folder(copied, downloaded=True)
    (copied / "config.yaml").write_text(f"{text}\nX: !!python/object/apply:os.mkdir [{target}]\n")
    with pytest.raises(ConfigError, match="no tag is ever executed"):
        open_folder(copied, downloaded=True)
    (copied / "config.yaml").write_text(text)
    (copied / "model.safetensors").unlink()
    for name in ("model_final.pth", "model_best.pth"):
        (copied / name).write_bytes(pickle.dumps(Calls(target)))
    with pytest.raises(CheckpointError, match=r"has no weights: model\.safetensors$"):
        open_folder(copied, downloaded=True)
    assert not target.exists()


@pytest.mark.parametrize(
    "run",
    [
        "[" * 100_000,
        "not json",
        "[1]",
        json.dumps({"class_names": ["a\x1b[2J"] * 6, "category_ids": [1, 2, 3, 4, 5, 6]}),
        json.dumps({"class_names": ["a", "b"], "category_ids": [1, 1]}),
    ],
)
def test_wrong_classes_in_the_metadata_are_left_out(copied, run):
    from safetensors.torch import load_file, save_file

    weights = load_file(copied / "model.safetensors")
    save_file(weights, copied / "model.safetensors", metadata={"cascade_det": run})
    detector = CascadeDetector.from_pretrained(copied)
    assert detector.class_names == [f"class {i}" for i in range(6)]


def test_the_hub_there_and_back(saved, images, tmp_path):
    """Both in a process of its own, which talks to a server as to the Hub."""
    pytest.importorskip("huggingface_hub")
    program = (
        "import sys, torch\n"
        "from cascade_det import CascadeDetector\n"
        "from cascade_det.errors import ConfigError, DownloadError\n"
        "torch.set_num_threads(1)\n"
        "folder, out, *images = sys.argv[1:]\n"
        "print(CascadeDetector.from_pretrained(folder).push_to_hub('me/shapes', private=True))\n"
        "detector = CascadeDetector.from_pretrained('hf://me/shapes')\n"
        "torch.save([vars(d) for d in detector.predict(images)], out)\n"
        "print(detector.class_names, detector.category_ids)\n"
        "for name in ('me/none', 'me/empty', 'a/b/c'):\n"
        "    try:\n"
        "        CascadeDetector.from_pretrained(f'hf://{name}')\n"
        "    except (ConfigError, DownloadError) as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    out = tmp_path / "found.pt"
    with hub() as server:
        server.repositories["me/empty"] = {"pytorch_model.bin": b"", "config.json": b"{"}
        settings = {
            "HF_ENDPOINT": server.endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "hf_none",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "no_proxy": "*",
        }
        result = subprocess.run(
            [sys.executable, "-c", program, str(saved), str(out), *images],
            env={**os.environ, **settings},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        lines = result.stdout.splitlines()
        assert lines[0] == f"{server.endpoint}/me/shapes/commit/{server.commit_of('me/shapes')}"
        files = server.repositories["me/shapes"]
        fetched = {path for method, path in server.asked if method == "GET" and "resolve" in path}
    detector = CascadeDetector.from_pretrained(saved)
    assert_same([type("Found", (), d) for d in torch.load(out)], detector.predict(images))
    assert lines[1] == f"{detector.class_names} {detector.category_ids}"
    assert lines[2].startswith("DownloadError hf://me/none: no such repository")
    assert lines[3].startswith("DownloadError hf://me/empty: has no config.yaml")
    assert lines[4].startswith("ConfigError hf://a/b/c: ")
    assert files.keys() == {"README.md", "config.yaml", "model.safetensors"}
    card = files["README.md"].decode()
    assert 'from_pretrained("hf://me/shapes")' in card
    assert "pipeline_tag: object-detection" in card
    # Of a repository, these two files and no other.
    names = ("config.yaml", "model.safetensors")
    assert fetched == {f"/me/shapes/resolve/main/{name}" for name in names}


def test_a_hub_out_of_reach_is_no_empty_repository(monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="cannot be reached, and is not in the cache"):
        CascadeDetector.from_pretrained("hf://me/never-fetched")


def test_without_the_hubs_library_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "cascade_det.facade.hub", raising=False)
    monkeypatch.delattr("cascade_det.facade.hub", raising=False)
    with pytest.raises(ImportError, match=r"the extra \[hub\]"):
        CascadeDetector.from_pretrained("hf://me/shapes")


def test_mistakes_are_told(saved, shapes, tmp_path, copied):
    opened = CascadeDetector.from_pretrained
    with pytest.raises(ConfigError, match=r"nowhere: is neither .* write hf://owner/name"):
        opened(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="revision is of repositories"):
        opened(saved, revision="main")
    with pytest.raises(CheckpointError, match=r"has no weights: model\.safetensors or model_best"):
        opened(tmp_path)
    with pytest.raises(ConfigError, match="is for detectors"):
        opened("quick_schedules/segment_shapes.yaml")
    with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTS is empty"):
        opened(ZOO).predict(np.zeros((20, 20, 3), np.uint8))
    detector = opened(saved)
    with pytest.raises(ValueError, match="data is the path of annotations, or a pair"):
        detector.evaluate(3)
    with pytest.raises(DatasetError, match="there are no such annotations"):
        detector.evaluate(tmp_path / "none.json")
    with pytest.raises(ConfigError, match=r"SOLVER\.MAX_ITER is given, but CASCADE\.EPOCHS is 2"):
        detector.fit((shapes / "train.json", shapes / "train"), epochs=2, opts=SHORT)
    (tmp_path / "other.json").write_text('{"images": []}')
    with pytest.raises(DatasetError, match="'categories' is missing"):
        detector.fit(tmp_path / "other.json", output_dir=tmp_path / "run")
    (copied / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"there is no config\.yaml beside it"):
        opened(copied)


def test_data_are_found_as_the_keys_name_them(shapes, tmp_path, images):
    """A COCO json and Pascal VOC; YOLO is trained on above."""
    cfg = config.load_config(INSTANT)
    coco = source_of((shapes / "train.json", shapes / "train"))
    assert class_names_of(cfg, coco) == list(CLASSES)
    voc = tmp_path / "voc"
    for folder in ("Annotations", "JPEGImages"):
        (voc / folder).mkdir(parents=True)
    shutil.copy(images[0], voc / "JPEGImages" / "a.jpg")
    (voc / "Annotations" / "a.xml").write_text(
        "<annotation><filename>a.jpg</filename><size><width>128</width><height>96</height></size>"
        "<object><name>dog</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>"
        "</bndbox></object></annotation>"
    )
    source = source_of(voc)
    assert class_names_of(cfg, source) == ["dog"]
    assert source.image_root == voc / "JPEGImages"
    keys = with_data(cfg, train=[coco, source], test=[source])
    assert keys.DATASETS.TRAIN == ("train0", "train1")
    assert keys.CASCADE.DATASETS[2] == ("test0", str(voc), str(voc / "JPEGImages"))
    config.check_config(keys)

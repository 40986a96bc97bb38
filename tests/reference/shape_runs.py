"""Small runs from data to evaluation, on six training and three validation images.

In ``tests/hosts`` the fixture ``host`` is each host in turn, in ``tests/d2`` Detectron2.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from cascade_det.config import load_config
from cascade_det.engine.step import TrainingStep
from make_shapes import make_dataset

ROOT = Path(__file__).resolve().parents[2]
INSTANT = str(ROOT / "configs" / "quick_schedules" / "instant_test.yaml")


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder with six training and three validation images of shapes."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    make_dataset(folder, train=6, val=3, width=128, height=96, hard=0.0)
    return folder


@pytest.fixture(scope="session")
def shape_options(shapes):
    """Options that point a configuration to those images."""
    datasets = [
        (f"shapes_{split}", str(shapes / f"{split}.json"), str(shapes / split))
        for split in ("train", "val")
    ]
    return ["CASCADE.DATASETS", str(datasets), "DATALOADER.NUM_WORKERS", "0"]


@pytest.fixture
def instant_cfg(shape_options, tmp_path):
    """The smallest shipped schedule on those images, with an output folder."""
    return load_config(INSTANT, [*shape_options, "OUTPUT_DIR", str(tmp_path / "output")])


@pytest.fixture(scope="session")
def options(shape_options):
    """Those options, with a line in the metrics for every iteration."""
    return [*shape_options, "CASCADE.LOG_PERIOD", "1"]


@pytest.fixture
def make_cfg(host, options, tmp_path):
    """``make_cfg(*options, output=name)``: a checked configuration of the host."""

    def make(*more, output="output", files=()):
        keys = [*options, "OUTPUT_DIR", str(tmp_path / output), *more]
        cfg = host.load_config([INSTANT, *files], keys)
        host.check_config(cfg)
        Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
        return cfg

    return make


@pytest.fixture
def on_step(monkeypatch):
    """``on_step(f)``: ``f(iteration, batch)`` is called before each training step."""
    step = TrainingStep.run

    def watch(call):
        def run(self, batch, iteration, **arguments):
            call(iteration, batch)
            return step(self, batch, iteration, **arguments)

        monkeypatch.setattr(TrainingStep, "run", run)

    return watch


@pytest.fixture
def no_pictures(monkeypatch):
    """Evaluation draws no charts, which take longer than the rest of these runs."""
    monkeypatch.setattr("cascade_det.engine.evaluate.plot_report", lambda *_, **__: None)
    monkeypatch.setattr("cascade_det.engine.evaluate.write_analysis", lambda *_, **__: None)
    monkeypatch.setattr("cascade_det.engine.evaluate.write_evaluation_page", lambda *_, **__: None)


@pytest.fixture
def own_catalog():
    """Remove the data sets that a test registers in Detectron2."""
    if "detectron2.data" not in sys.modules:
        yield
        return
    from detectron2.data import DatasetCatalog, MetadataCatalog

    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def saved(cfg, name="model_final.pth"):
    """A checkpoint in the output folder."""
    return torch.load(Path(cfg.OUTPUT_DIR, name), weights_only=True)


def metrics_of(folder):
    """The lines of ``metrics.json``."""
    return [json.loads(line) for line in Path(folder, "metrics.json").read_text().splitlines()]


def rates(folder):
    """The learning rate of each iteration that ``metrics.json`` has."""
    return {line["iteration"]: line["lr"] for line in metrics_of(folder) if "lr" in line}


def assert_same(found, expected, at=""):
    """Equal types and values to the last bit, at every depth of dicts and lists."""
    assert type(found) is type(expected), at
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), at
        for key in expected:
            assert_same(found[key], expected[key], f"{at}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), at
        for number, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{at}/{number}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), at
    else:
        assert found == expected, at

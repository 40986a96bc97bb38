"""Small runs in Detectron2, made once for the tests that look at them."""

import sys
from pathlib import Path

import pytest

from cascade_det.engine.step import TrainingStep
from make_shapes import make_dataset

ROOT = Path(__file__).resolve().parents[2]
INSTANT = str(ROOT / "configs" / "quick_schedules" / "instant_test.yaml")


@pytest.fixture(autouse=True)
def _own_catalog():
    """Take out of Detectron2's catalogs what a test has put there."""
    if "detectron2.data" not in sys.modules:
        yield
        return
    from detectron2.data import DatasetCatalog, MetadataCatalog

    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder with six training and three validation scenes."""
    folder = tmp_path_factory.mktemp("scenes") / "shapes"
    make_dataset(folder, train=6, val=3, width=128, height=96, hard=0.0)
    return folder


@pytest.fixture(scope="session")
def options(scenes):
    """What the smallest schedule needs to run on them; options, as they come from a command."""
    datasets = [
        (f"scenes_{split}", str(scenes / f"{split}.json"), str(scenes / split))
        for split in ("train", "val")
    ]
    names = ["DATASETS.TRAIN", "('scenes_train',)", "DATASETS.TEST", "('scenes_val',)"]
    return ["CASCADE.DATASETS", str(datasets), *names, "CASCADE.LOG_PERIOD", "1"]


@pytest.fixture
def make_cfg(options, tmp_path):
    """Gives configurations of Detectron2, as the command makes them, with folders below one."""
    from cascade_det.d2 import host

    def make(*more, output="output"):
        cfg = host.load_config(INSTANT, [*options, "OUTPUT_DIR", str(tmp_path / output), *more])
        host.check_config(cfg)
        Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
        return cfg

    return make


@pytest.fixture
def on_step(monkeypatch):
    """``on_step(f)``: ``f(iteration, batch)`` is called before each step, and sees all of them."""
    step = TrainingStep.run

    def watch(call):
        def run(self, batch, iteration, **arguments):
            call(iteration, batch)
            return step(self, batch, iteration, **arguments)

        monkeypatch.setattr(TrainingStep, "run", run)

    return watch


@pytest.fixture
def on_evaluation(monkeypatch):
    """``on_evaluation(f)``: what ``f()`` returns is the AP, and evaluating takes no time."""

    def replace(call):
        monkeypatch.setattr(
            "cascade_det.d2.train.evaluate_all", lambda *_: {"bbox": {"AP": call()}}
        )

    return replace


@pytest.fixture
def no_pictures(monkeypatch):
    """Evaluation draws no charts: they take longer than everything else in these runs."""
    monkeypatch.setattr("cascade_det.engine.evaluate.plot_report", lambda *_, **__: None)
    monkeypatch.setattr("cascade_det.engine.evaluate.write_analysis", lambda *_, **__: None)

"""Small runs of the whole road, made once for the tests that look at them."""

from pathlib import Path

import pytest

from cascade_det.config import load_config
from make_shapes import make_dataset

ROOT = Path(__file__).resolve().parents[2]
INSTANT = ROOT / "configs" / "quick_schedules" / "instant_test.yaml"


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder with six training and three validation scenes."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    make_dataset(folder, train=6, val=3, width=128, height=96, hard=0.0)
    return folder


@pytest.fixture(scope="session")
def shape_options(shapes):
    """Options that point a configuration to those scenes."""
    datasets = [
        (f"shapes_{split}", str(shapes / f"{split}.json"), str(shapes / split))
        for split in ("train", "val")
    ]
    return ["CASCADE.DATASETS", str(datasets), "DATALOADER.NUM_WORKERS", "0"]


@pytest.fixture
def instant_cfg(shape_options, tmp_path):
    """The smallest shipped schedule on those scenes, with a folder of its own."""
    return load_config(INSTANT, [*shape_options, "OUTPUT_DIR", str(tmp_path / "output")])

"""A benchmark small enough for a test: ResNet-18, 64 x 96 pixels, 40 proposals."""

from pathlib import Path

import pytest
import torch

from cascade_det.benchmark.options import Options, Survivors
from cascade_det.benchmark.setup import Setup

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quick_schedules" / "demo.yaml"


@pytest.fixture(scope="session")
def make_options():
    """Options of a small benchmark, with configuration keys and with changes."""

    def make(*keys, **changes):
        small = {
            "config_file": (str(CONFIG),),
            "opts": ("MODEL.CASCADE.FAST.DTYPE", "float32", *keys),
            "size": (64, 96),
            "proposals": (40,),
            "rounds": 2,
            "warmup": 0,
            "survivors": Survivors((20.0, 9.5, 3.0), "a test"),
        }
        return Options(**{**small, **changes})

    return make


@pytest.fixture(scope="session")
def setup(make_options):
    """What small models share, with random weights; all of them compute in float32."""
    return Setup(make_options())


@pytest.fixture(scope="session")
def heads_output(setup):
    """Runs the heads of a model on given regions of two images."""

    def run(model, setup=setup, count=40):
        batch = setup.batches(2)[0]
        adapter, regions = model.adapter, setup.regions(batch, count)
        with torch.no_grad():
            prepared = adapter.prepare(batch, regions, model.autocast)
        return adapter.output(model.run(adapter.heads, prepared))

    return run


@pytest.fixture(scope="session")
def whole_output(setup):
    """Runs a whole model on two images."""

    def run(model, count=40):
        adapter = model.adapter
        adapter.limit_proposals(count)
        return adapter.output(model.run(adapter.whole, adapter.inputs(setup.batches(2)[0])))

    return run

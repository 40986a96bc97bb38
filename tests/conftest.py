"""What every test gets: the references, a known state of all chance, and the old state back."""

import logging
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

# What tests compare with.
sys.path.append(str(Path(__file__).parent / "reference"))

# Fixtures that the tests of several rooms share.
pytest_plugins = [
    "coco_sets",
    "evaluated",
    "offline_runs",
    "semantic_sets",
    "shape_runs",
    "toy_detectors",
]

# The same examples in every run of the same tests; --hypothesis-profile=explore draws new ones.
settings.register_profile("explore", deadline=None)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

torch.set_num_threads(1)
# Under nohup it is ignored, and a run that ignores it does not end by it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _own_randomness():
    """Seed all generators before each test, so that no test depends on which ran before it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])


@pytest.fixture(autouse=True)
def _own_logging():
    """Take away the handlers that a command has set up."""
    yield
    for name in ("cascade_det", "fvcore", "detectron2"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).setLevel(logging.NOTSET)

"""The fixtures of ``shape_runs`` in Detectron2."""

import pytest

from cascade_det.hosts import load_host


@pytest.fixture(scope="session")
def host():
    return load_host("detectron2")


@pytest.fixture(autouse=True)
def _own_catalog(own_catalog):
    pass


@pytest.fixture
def on_evaluation(monkeypatch):
    """``on_evaluation(f)``: what ``f()`` returns is the AP, and evaluating takes no time."""

    def replace(call):
        monkeypatch.setattr(
            "cascade_det.d2.train.evaluate_all", lambda *_: {"bbox": {"AP": call()}}
        )

    return replace

"""Both hosts: tests that take the fixture ``host`` run once in each."""

import pytest

from cascade_det.hosts import load_host

HOSTS = ("standalone", pytest.param("detectron2", marks=pytest.mark.needs_detectron2))


@pytest.fixture(scope="session", params=HOSTS)
def host(request):
    """``cascade_det.standalone.host`` or ``cascade_det.d2.host``, with its name."""
    if request.param == "detectron2":
        pytest.importorskip("detectron2.engine", exc_type=ImportError)
    host = load_host(request.param)
    host.name = request.param
    return host


@pytest.fixture(scope="session")
def build_model(host):
    """``build_model(cfg)``: the module that is trained, with initial weights."""
    if host.name == "standalone":
        from cascade_det.standalone import build_detector

        return build_detector
    from detectron2.modeling import build_model

    return build_model


@pytest.fixture(autouse=True)
def _own_catalog(own_catalog):
    pass

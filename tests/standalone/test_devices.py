"""The device that MODEL.DEVICE asks for, on machines with some GPUs, one or none."""

import pytest
import torch
from shape_runs import INSTANT

from cascade_det.config import load_config
from cascade_det.engine.devices import resolve_device
from cascade_det.errors import ConfigError
from cascade_det.standalone import build_detector


@pytest.fixture
def gpus(monkeypatch):
    def have(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Model {index}")

    return have


@pytest.mark.parametrize(
    ("count", "name"),
    [(0, "cpu"), (2, "cpu"), (1, "cuda"), (1, "cuda:0"), (4, "cuda:3"), (2, "cuda")],
)
def test_a_device_that_is_there_is_taken(count, name, gpus):
    gpus(count)
    assert resolve_device(load_config(None, ["MODEL.DEVICE", name])) == torch.device(name)


@pytest.mark.parametrize(
    ("count", "name", "there"),
    [
        (1, "cuda:1", "the GPUs here are cuda:0 (Model 0)."),
        (2, "cuda:3", "the GPUs here are cuda:0 (Model 0), cuda:1 (Model 1)."),
        (1, "cuda:99999999999999999999", "the GPUs here are cuda:0 (Model 0)."),
        (0, "cuda:0", "there is no GPU here"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(count, name, there, gpus):
    gpus(count)
    with pytest.raises(ConfigError) as caught:
        resolve_device(load_config(None, ["MODEL.DEVICE", name]))
    assert str(caught.value).startswith(f"MODEL.DEVICE is {name}, but {there}")


def test_an_indexed_gpu_becomes_the_current_one(gpus, monkeypatch):
    chosen = []
    gpus(2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: module)
    for name in ("cuda:1", "cuda", "cpu"):
        build_detector(load_config(INSTANT, ["MODEL.DEVICE", name]))
    assert chosen == [torch.device("cuda:1")]


def test_cuda_without_a_gpu_is_the_cpu_and_says_so(gpus, caplog):
    gpus(0)
    with caplog.at_level("WARNING"):
        assert resolve_device(load_config(None)) == torch.device("cpu")
    assert "MODEL.DEVICE is cuda, but no GPU is available" in caplog.text

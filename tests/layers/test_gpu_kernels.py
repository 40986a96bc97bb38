"""When the kernels in Triton are used; no GPU is needed to say no."""

import importlib.util

import pytest
import torch

from cascade_det.layers import gpu_kernels

GPU = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine whose GPU runs everything; tests take something away."""
    gpu_kernels.has_triton.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(gpu_kernels, "_try_on", lambda _: None)
    yield
    gpu_kernels.has_triton.cache_clear()


def test_all_is_there():
    assert gpu_kernels.has_triton(GPU)
    assert not gpu_kernels.has_triton(torch.device("cpu"))


def test_triton_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert not gpu_kernels.has_triton(GPU)


def test_a_gpu_that_is_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    assert not gpu_kernels.has_triton(GPU)


def test_a_kernel_that_does_not_run_is_reported_once(monkeypatch, caplog):
    def fail(_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(gpu_kernels, "_try_on", fail)
    assert [gpu_kernels.has_triton(GPU) for _ in range(2)] == [False, False]
    [message] = caplog.messages
    assert "torchvision's are used" in message
    assert "Failed to find C compiler" in message

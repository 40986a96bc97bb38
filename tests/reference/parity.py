"""Numbers of the official implementations, where they are at hand."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
# What official networks have and never train: indices of biases, and a norm that they never use.
_UNUSED = ("attention_bias_idxs", "proj_norm.")


def description(name):
    """What a json file says; skips the test where there is none."""
    return json.loads(_file(f"{name}.json").read_text())


def vectors(name):
    """Tensors of a file by name; skips the test where there is none."""
    return pytest.importorskip("safetensors.torch").load_file(_file(f"{name}.safetensors"))


def _file(name):
    path = Path(os.environ.get("CASCADE_DET_TEST_DATA", _DATA)).parent / "parity" / name
    if not path.is_file():
        pytest.skip(f"no numbers of official implementations: {path}")
    return path


def state(tensors, prefix=""):
    """The state dict whose official names begin with ``prefix``, without what is never trained."""
    prefix = f"param.{prefix}"
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not any(part in name for part in _UNUSED)
    }


def inputs_of(tensors):
    """Names of the inputs, in order."""
    return sorted(name for name in tensors if name.startswith("input."))


def assert_near(found, expected, tolerance):
    """The largest difference, relative to the largest expected value, is within ``tolerance``."""
    assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def check(name, model, run=None, *, prefix="", tolerance=2e-5, gradients=5e-5):
    """Outputs, gradients and norm statistics of ``model`` against those of a file.

    ``run`` takes the inputs and returns a list of outputs; by default the model's one output.
    ``model`` is in the mode of the training pass, whose outputs have the ``tolerance``; without
    ``gradients``, their tolerance, they are not compared.
    """
    run = run or (lambda *inputs: [model(*inputs)])
    tensors = vectors(name)
    model.load_state_dict(state(tensors, prefix))
    names = inputs_of(tensors)
    inputs = [tensors[key] for key in names]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        found = run(*inputs)
    for i, output in enumerate(found):
        assert_near(output, tensors[f"output.{i}"], 2e-5)

    for module, mode in modes:
        module.training = mode
    for tensor in inputs:
        tensor.requires_grad_()
    found = run(*inputs)
    for i, output in enumerate(found):
        if f"train_output.{i}" in tensors:  # MERIT's have none
            assert_near(output, tensors[f"train_output.{i}"], tolerance)
    if gradients is None:
        return
    sum((x * tensors[f"cotangent.{i}"]).sum() for i, x in enumerate(found)).backward()
    for key, tensor in zip(names, inputs, strict=True):
        assert_near(tensor.grad, tensors[f"grad.{key}"], gradients)
    statistics = model.state_dict()
    for key in (key for key in tensors if key.startswith("after_train.")):
        buffer = statistics[key.removeprefix(f"after_train.{prefix}")]
        assert_near(buffer, tensors[key], 2e-5)
    expected = {
        key.removeprefix(prefix): numbers
        for key, numbers in description(name)["param_grad_stats"].items()
        if numbers is not None
    }
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    # A batch norm cancels the gradient of a bias before it, but for rounding.
    least = max(norm for _, norm in expected.values()) / 100
    for key, (total, norm) in expected.items():
        gradient, bound = parameters[key].grad.double(), gradients * max(norm, least)
        assert abs(float(gradient.norm()) - norm) <= bound, key
        # A sum of n values is at most sqrt(n) times their norm.
        assert abs(float(gradient.sum()) - total) <= bound * gradient.numel() ** 0.5, key

"""What official implementations compute, in files beside the repository."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


def official_file(name):
    """The path of a file; skips the test where there are none."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("CASCADE_DET_TEST_DATA", default)).parent / "parity"
    if not folder.is_dir():
        pytest.skip(f"no outputs of official implementations at {folder}")
    return folder / name


def official_json(name):
    return json.loads(official_file(f"{name}.json").read_text())


class Vectors:
    """A module's recorded parameters, inputs, outputs and gradients.

    Attributes:
        config: arguments of the official constructor.
        tensors: by name.
        state: parameters and buffers by official name.
    """

    def __init__(self, name):
        about = official_json(name)
        self.config, self.gradients = about["config"], about["param_grad_stats"]
        self.tensors = load_file(official_file(f"{name}.safetensors"))
        prefix = "param."
        self.state = {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}

    def check(self, module, forward=None):
        """Outputs in evaluation mode and in training; gradients of input and parameters.

        Args:
            module: with the parameters of ``state``, one input and one output.
            forward: what to call instead of it.
        """
        forward = forward or module
        module.eval()
        with torch.no_grad():
            output = forward(self.tensors["input.0"])
        assert_near(output, self.tensors["output.0"], 2e-5)

        module.train()
        x = self.tensors["input.0"].clone().requires_grad_()
        output = forward(x)
        assert_near(output, self.tensors["train_output.0"], 2e-5)
        (output * self.tensors["cotangent.0"]).sum().backward()
        assert_near(x.grad, self.tensors["grad.input.0"], 5e-5)
        for name, parameter in module.named_parameters():
            total, norm = self.gradients[name]
            gradient = parameter.grad.double()
            assert abs(gradient.norm() - norm) <= 5e-5 * max(norm, 1e-3), name
            # The sum of numbers of either sign: relative to their size, not to itself.
            assert abs(gradient.sum() - total) <= 5e-5 * max(gradient.abs().sum(), 1e-2), name


def assert_near(actual, expected, tolerance):
    """Largest difference relative to the largest expected value."""
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max() / expected.abs().max()
    assert difference <= tolerance, f"{difference:.1e}"

"""Modules that are nothing but a state dict: stand-ins for networks with official names."""

import torch
from torch import nn

_COUNT = "num_batches_tracked"
_STATISTICS = ("running_mean", "running_var", _COUNT)


def named_module(shapes):
    """A module whose state dict has these names and shapes: statistics of norms are buffers."""
    root = nn.Module()
    for name, shape in shapes.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        if last in _STATISTICS:
            dtype = torch.int64 if last == _COUNT else torch.float32
            module.register_buffer(last, torch.zeros(shape, dtype=dtype))
        else:
            module.register_parameter(last, nn.Parameter(torch.randn(shape)))
    return root


def noise(shapes):
    """A random state dict."""
    return {
        name: torch.tensor(7) if name.endswith(_COUNT) else torch.randn(shape)
        for name, shape in shapes.items()
    }

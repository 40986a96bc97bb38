"""cuDNN's fused convolutions, on a pretended GPU: their numbers, and when they are used."""

import pytest
import torch
from torch import nn

from cascade_det.backbones import ResNet
from cascade_det.benchmark import pretended_gpu
from cascade_det.benchmark.pretended_gpu import PretendedGPU
from cascade_det.layers.conv_norm import ConvNorm, add_convolved, convolved_relu
from cascade_det.layers.folding import fold_norms

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHANNELS_LAST = torch.channels_last


def make(channels=8, out_channels=16, kernel_size=3, dtype=torch.float32, **arguments):
    """A convolution, a map for it and a shortcut, channels-last."""
    conv = ConvNorm(channels, out_channels, kernel_size, **arguments).eval().requires_grad_(False)
    x = torch.randn(2, channels, 7, 10)
    shortcut = torch.randn_like(conv(x))
    parts = conv.to(dtype), x.to(dtype), shortcut.to(dtype)
    return [part.to(memory_format=CHANNELS_LAST) for part in parts]


def truth(conv, x, shortcut=None):
    """In float64."""
    y = nn.functional.conv2d(
        *(t.double() for t in (x, conv.weight, conv.bias)),
        stride=conv.stride,
        padding=conv.padding,
        groups=conv.groups,
    )
    return (y if shortcut is None else y + shortcut.double()).clamp(min=0)


def run(conv, x, shortcut=None, *, autocast=False):
    """The result of a second call, and its operations: the kind is tried at the first one."""
    with PretendedGPU() as gpu, torch.no_grad(), torch.autocast("cuda", enabled=autocast):
        gpu.move(conv)
        x, shortcut = gpu.move(x), None if shortcut is None else gpu.move(shortcut)
        for _ in range(2):
            gpu.reset()
            if shortcut is None:
                y = convolved_relu(x, conv)
            else:
                y = add_convolved(gpu.move(shortcut.held.clone()), x, conv)
        assert gpu.waits.total() == 0
    return y.held, gpu.launches


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize("adds", [False, True])
def test_one_call_where_possible(dtype, kernel_size, stride, adds):
    conv, x, shortcut = make(kernel_size=kernel_size, stride=stride, dtype=dtype)
    given = (x, shortcut) if adds else (x,)
    wanted = truth(conv, *given)
    y, launches = run(conv, *given)
    assert launches == 1
    assert (y.dtype, y.is_contiguous(memory_format=CHANNELS_LAST)) == (dtype, True)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(y.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(
    "arguments", [{"channels": 3}, {"out_channels": 12}, {"groups": 2}, {"norm": "FrozenBN"}]
)
def test_other_convolutions_are_as_before(arguments, adds):
    conv, x, shortcut = make(**arguments)
    given = (x, shortcut) if adds else (x,)
    conv.bias = conv.bias if conv.norm is None else nn.Parameter(torch.zeros(16))
    wanted = truth(conv, *given)
    if conv.norm is not None:  # of a new norm: nearly the identity
        conv.bias = None
    y, launches = run(conv, *given)
    assert launches == 2 + adds + (conv.norm is not None)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)


def test_planes_hooks_and_autocast_are_as_before():
    conv, x, _ = make()
    assert run(conv, x.contiguous())[1] == 2
    with torch.backends.cudnn.flags(enabled=False):
        assert run(conv, x)[1] == 2
    assert run(conv, x, autocast=True)[1] == 2
    conv.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    assert run(conv, x)[1] == 3


def test_a_folded_trunk_sends_four_operations_less_for_each_block():
    trunk = ResNet(depth=50, out_features=("res3", "res5"), width_per_group=8).eval()
    fold_norms(trunk)
    trunk.requires_grad_(False).to(memory_format=CHANNELS_LAST)
    images = torch.randn(1, 3, 64, 96).contiguous(memory_format=CHANNELS_LAST)
    launches, maps = [], []
    with PretendedGPU() as gpu, torch.no_grad():
        gpu.move(trunk)
        for fused in (True, True, False):
            gpu.reset()
            with torch.backends.cudnn.flags(enabled=fused):
                maps.append(trunk(gpu.move(images)))
            launches.append(gpu.launches)
    blocks = 3 + 4 + 6 + 3
    assert launches[2] - launches[1] == 4 * blocks  # three of ReLU and a sum
    for name, wanted in maps[2].items():
        torch.testing.assert_close(maps[1][name].held, wanted.held, rtol=1e-4, atol=1e-4)


def test_gradients_pass():
    conv, x, shortcut = make()
    conv.weight.requires_grad_()
    with PretendedGPU() as gpu:
        gpu.move(conv)
        x, shortcut = gpu.move(x), gpu.move(shortcut)
        (convolved_relu(x, conv) + add_convolved(shortcut, x, conv)).sum().backward()
    assert conv.weight.grad.held.abs().sum() > 0


def _missing(*_):
    raise RuntimeError("FIND was unable to find an engine to execute this computation")


@pytest.mark.parametrize(
    "kernel", [_missing, lambda x, weight, *_: torch.relu(torch.conv2d(x, weight, padding=1))]
)
def test_a_kernel_that_is_missing_or_wrong_is_not_used(monkeypatch, kernel):
    monkeypatch.setattr(pretended_gpu, "OF_GPUS", dict.fromkeys(pretended_gpu.OF_GPUS, kernel))
    conv, x, shortcut = make()
    wanted = truth(conv, x), truth(conv, x, shortcut)
    for given, value in zip(((x,), (x, shortcut)), wanted, strict=True):
        y, launches = run(conv, *given)
        assert launches == 1 + len(given)
        torch.testing.assert_close(y.double(), value, rtol=1e-4, atol=1e-4)

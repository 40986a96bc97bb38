"""Winograd's convolutions against direct ones in float64, and what is replaced by them."""

import copy
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from cascade_det.layers import winograd as layers_winograd
from cascade_det.layers import winograd_kernel
from cascade_det.layers.conv_norm import ConvNorm
from cascade_det.layers.winograd import WinogradConv2d, use_winograd
from cascade_det.layers.winograd_kernel import transform_weight, winograd_conv2d
from cascade_det.layers.workers import _workers

CHANNELS = layers_winograd.min_channels()


def truth(x, weight, bias=None):
    bias = None if bias is None else bias.double()
    return F.conv2d(x.double(), weight.double(), bias, padding=1)


def assert_close(ours, expected, scale=1.0):
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-4 * scale)


def conv3x3(in_channels=CHANNELS, out_channels=CHANNELS, **changes):
    return nn.Conv2d(in_channels, out_channels, 3, **{"padding": 1, **changes}).eval()


@settings(max_examples=60)
@given(
    images=st.integers(1, 3),
    channels=st.integers(1, 9),
    out_channels=st.integers(1, 9),
    height=st.integers(1, 23),
    width=st.integers(1, 23),
    memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(images, channels, out_channels, height, width, memory_format, biased, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, channels, height, width, generator=generator)
    weight = torch.randn(out_channels, channels, 3, 3, generator=generator) / 3
    bias = torch.randn(out_channels, generator=generator) if biased else None
    x = x.contiguous(memory_format=memory_format)
    before = x.clone()
    y = winograd_conv2d(x, transform_weight(weight), bias)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before)
    assert_close(y, truth(x, weight, bias))


@settings(max_examples=40)
@given(
    images=st.integers(1, 3),
    height=st.integers(1, 23),
    width=st.integers(1, 23),
    norm=st.sampled_from([None, nn.GroupNorm(1, 4)]),
    seed=st.integers(0, 1000),
)
def test_the_result_goes_where_it_shall(images, height, width, norm, seed):
    torch.manual_seed(seed)
    x = torch.randn(images, 3, height, width)
    conv = conv3x3(3, 4)
    size = images * 4 * height * width
    block = torch.full((size + 20,), 7.0)
    out = block[10:-10].view(images, height, width, 4).permute(0, 3, 1, 2)
    module = WinogradConv2d(conv)
    module.norm = norm
    with torch.no_grad():
        y = module(x, out=out)
        expected = conv(x) if norm is None else norm(conv(x))
    assert y is out
    assert_close(y, expected.double())
    assert block[:10].eq(7).all()
    assert block[-10:].eq(7).all()


@pytest.mark.parametrize(
    "shape",
    [(1, 256, 9, 260), (1, 256, 60, 70), (7, 256, 21, 13), (2, 512, 30, 60)],
    ids=["one row fills a band", "several bands", "several images in a band", "bands and images"],
)
def test_bands(shape):
    x = torch.randn(shape)
    weight = torch.randn(4, shape[1], 3, 3) / (3 * shape[1] ** 0.5)
    assert_close(winograd_conv2d(x, transform_weight(weight)), truth(x, weight))


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_another_thread_between_two_steps_changes_nothing(monkeypatch):
    """The room for intermediate results is each thread's own."""
    generator = torch.Generator().manual_seed(0)
    weight = transform_weight(torch.randn(4, 5, 3, 3, generator=generator))
    images = [torch.randn(1, 5, 9, 14, generator=generator) for _ in range(2)]
    alone = [winograd_conv2d(image, weight, None) for image in images]
    others, product = [], winograd_kernel.batched_product
    with ThreadPoolExecutor(1) as pool:

        def after_another(*arguments, **options):
            if threading.current_thread() is threading.main_thread():
                others.append(pool.submit(winograd_conv2d, images[1], weight, None).result())
            return product(*arguments, **options)

        monkeypatch.setattr(winograd_kernel, "batched_product", after_another)
        mine = winograd_conv2d(images[0], weight, None)
    assert others
    assert torch.equal(mine, alone[0])
    assert all(torch.equal(other, alone[1]) for other in others)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_threads_share_the_work(mode):
    weight, bias = torch.randn(4, 256, 3, 3) / 48, torch.randn(4)
    transformed = transform_weight(weight)
    for shape in ((1, 256, 60, 70), (1, 256, 7, 9), (5, 256, 9, 11), (1, 256, 3, 3)):
        x = torch.randn(shape)
        with mode():
            y = winograd_conv2d(x, transformed, bias)
        assert_close(y, truth(x, weight, bias))
        assert y.is_inference() == (mode is torch.inference_mode)
    assert torch.get_num_threads() == 2
    assert _workers(2, os.getpid()).submit(torch.get_num_threads).result() == 1
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [2], "threads that start later work alone"


@pytest.mark.usefixtures("two_threads")
def test_an_error_in_a_thread_is_raised():
    with pytest.raises(RuntimeError, match=r"size|primitive descriptor"):
        winograd_conv2d(torch.randn(1, 8, 200, 200), torch.randn(36, 9, 4))


def test_any_view():
    weight = torch.randn(3, 5, 3, 3)
    x = torch.randn(2, 30, 8, 11).permute(0, 2, 3, 1)[:, 1:6, ::2]
    assert_close(winograd_conv2d(x, transform_weight(weight)), truth(x, weight), scale=5)


def test_the_error_is_that_of_a_few_roundings():
    x = torch.randn(1, 256, 40, 40).relu_()
    weight = torch.randn(256, 256, 3, 3) / 48
    expected = truth(x, weight)
    error = winograd_conv2d(x, transform_weight(weight)).double().sub_(expected).std()
    direct = F.conv2d(x, weight, padding=1).double().sub_(expected).std()
    assert error < 1e-5 * expected.std()
    assert error < 16 * direct


def test_a_module_takes_the_state_of_the_direct_one():
    conv = conv3x3(5, 7)
    other = conv3x3(5, 7)
    winograd = WinogradConv2d(conv)
    assert winograd.state_dict().keys() == conv.state_dict().keys()
    assert not winograd.training
    winograd.load_state_dict(other.state_dict())
    x = torch.randn(1, 5, 40, 40)
    with torch.no_grad():
        assert_close(winograd(x), truth(x, other.weight, other.bias))


@pytest.fixture
def products(monkeypatch):
    """Shapes of the inputs that took Winograd's way."""
    shapes = []

    def counted(x, *arguments, **options):
        shapes.append(tuple(x.shape))
        return winograd_conv2d(x, *arguments, **options)

    monkeypatch.setattr(layers_winograd, "winograd_conv2d", counted)
    return shapes


@pytest.mark.parametrize(
    ("shape", "fast"),
    [
        ((1, 3, 48, 48), True),
        ((9, 3, 13, 7), True),
        ((1, 3, 12, 12), False),
        ((0, 3, 90, 90), False),
    ],
)
def test_small_maps_are_left_to_the_direct_convolution(products, shape, fast):
    conv = conv3x3(3, 4)
    x = torch.randn(shape)
    with torch.inference_mode():
        y = WinogradConv2d(conv)(x)
    assert (products == [shape]) == fast
    assert y.numel() == 0 or y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, truth(x, conv.weight, conv.bias))


def test_gradients_are_those_of_the_direct_convolution(products):
    conv = conv3x3(3, 4)
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    expected = torch.autograd.grad(conv(x).square().sum(), [x, conv.weight])
    ours = torch.autograd.grad(WinogradConv2d(conv)(x).square().sum(), [x, conv.weight])
    torch.testing.assert_close(ours, expected)
    assert products == []


def test_frozen_parameters_need_no_gradients(products):
    conv = conv3x3(3, 4).requires_grad_(False)
    WinogradConv2d(conv)(torch.randn(1, 3, 64, 64))
    assert products == [(1, 3, 64, 64)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_left_to_the_direct_convolution(products, dtype):
    conv = conv3x3(3, 4)
    x = torch.randn(1, 3, 64, 64, dtype=dtype)
    winograd = WinogradConv2d(copy.deepcopy(conv)).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(winograd(x), conv.to(dtype)(x))
    assert products == []


def test_autocast_is_left_to_the_direct_convolution(products):
    conv = conv3x3(3, 4)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(WinogradConv2d(conv)(x), conv(x))
    assert products == []


@pytest.mark.parametrize("norm", ["GN", "FrozenBN", ""])
def test_a_norm_comes_after(norm):
    conv = ConvNorm(CHANNELS, CHANNELS, 3, norm=norm).eval()
    host = nn.Sequential(copy.deepcopy(conv))
    assert use_winograd(host) == 1
    assert host[0].state_dict().keys() == conv.state_dict().keys()
    x = torch.randn(1, CHANNELS, 31, 33)
    with torch.no_grad():
        assert_close(host(x), copy.deepcopy(conv).double()(x.double()))


class Other(nn.Conv2d):
    """A convolution that may do more than its parent."""


def test_only_what_pays_is_replaced():
    shared = conv3x3()
    norm = ConvNorm(CHANNELS, CHANNELS + 1, 3).eval()
    fit = [conv3x3(), conv3x3(bias=False), norm, nn.Sequential(nn.ReLU(), shared), shared]
    unfit = [
        nn.Conv2d(CHANNELS, CHANNELS, 1, padding=1).eval(),
        nn.Conv2d(CHANNELS, CHANNELS, 5, padding=1).eval(),
        conv3x3(stride=2),
        conv3x3(padding=0),
        conv3x3(padding_mode="reflect"),
        conv3x3(dilation=2),
        conv3x3(groups=2),
        conv3x3(CHANNELS - 1),
        conv3x3(CHANNELS, CHANNELS - 1),
        conv3x3(dtype=torch.bfloat16),
        conv3x3(device="meta"),
        Other(CHANNELS, CHANNELS, 3, padding=1).eval(),
        conv3x3().train(),
    ]
    host = nn.ModuleList([*fit, *unfit])
    names = host.state_dict().keys()
    assert use_winograd(host) == 4
    assert host.state_dict().keys() == names
    assert list(host)[len(fit) :] == unfit
    assert [type(m) for m in list(host)[:3]] == [WinogradConv2d] * 3
    assert isinstance(host[4], WinogradConv2d)
    assert host[4] is host[3][1]
    assert use_winograd(host) == 0, "a second call found more"


@pytest.mark.parametrize(
    "change",
    [{"stride": 2}, {"padding": 0}, {"dilation": 2}, {"groups": 2}, {"padding_mode": "circular"}],
    ids=str,
)
def test_a_convolution_of_another_kind_is_refused(change):
    with pytest.raises(ValueError, match="not 3x3"):
        WinogradConv2d(conv3x3(4, 4, **change))


@pytest.mark.parametrize(("lacks", "replaced"), [(False, 2), (True, 1)])
def test_fewer_channels_pay_where_mkl_is_fast(monkeypatch, lacks, replaced):
    monkeypatch.setattr(layers_winograd, "mkl_lacks_avx512", lambda: lacks)
    model = nn.Sequential(conv3x3(128, 128), conv3x3(256, 256), conv3x3(64, 64))
    assert use_winograd(model) == replaced

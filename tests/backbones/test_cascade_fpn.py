"""The CASCADE decoder as a pyramid, against its formulas written out, and what must not change."""

import copy
import itertools

import pytest
import torch
from small_backbones import Listed
from torch import nn
from torch.fx.experimental import _config as symbolic_config
from torch.nn import functional as F

from cascade_det.backbones import CascadeFPN
from cascade_det.layers.folding import fold_norms
from cascade_det.layers.winograd import WinogradConv2d, use_winograd

C = 32


class Maps(nn.Module):
    """A trunk that halves the image to maps of 4, 5, ... channels, with a weight of its own."""

    def __init__(self, *features):
        super().__init__()
        self.out_features = features
        self.channels = {name: 4 + i for i, name in enumerate(features)}
        self.weight = nn.Parameter(torch.ones(8, 3))

    def forward(self, images):
        maps = {}
        for name, width in self.channels.items():
            stride = 2 ** int(name[-1])
            pooled = F.avg_pool2d(images, stride, ceil_mode=True)
            maps[name] = torch.einsum("kc,nchw->nkhw", self.weight[:width], pooled).sin()
        return maps


def make(*features, out_channels=C, **options):
    """In evaluation mode, with values that let every layer count."""
    torch.manual_seed(0)
    neck = CascadeFPN(Maps(*features), out_channels=out_channels, **options)
    for name, value in [*neck.named_parameters(), *neck.named_buffers()]:
        if value.dim() > 1:
            value.data.normal_(std=(2 / value[0].numel()) ** 0.5)
        elif name.endswith(("weight", "running_var")):
            value.data.uniform_(0.5, 1.5)
        elif value.is_floating_point():
            value.data.normal_(std=0.3)
    return neck.eval()


class Formulas:
    """The decoder by plain functions of its state dict."""

    def __init__(self, state):
        self.state = state

    def conv(self, name, x, *, stride=1):
        weight = self.state[f"{name}.weight"]
        bias = self.state.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride, padding=weight.shape[2] // 2)

    def norm(self, name, x):
        mean, var, weight, bias = (
            self.state[f"{name}.{kind}"][:, None, None]
            for kind in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def level(self, number, x, coarser=None):
        if coarser is None:
            v = self.conv("decoder.Conv_1x1", x)
        else:
            rows, columns = (
                torch.arange(n) * m // n
                for n, m in zip(x.shape[2:], coarser.shape[2:], strict=True)
            )
            up = self.conv(f"decoder.Up{number}.up.1", coarser[:, :, rows][..., columns])
            up = self.norm(f"decoder.Up{number}.up.2", up).relu()
            gate = f"decoder.AG{number}"
            both = sum(
                self.norm(f"{gate}.{side}.1", self.conv(f"{gate}.{side}.0", map_))
                for side, map_ in (("W_g", up), ("W_x", x))
            )
            psi = self.norm(f"{gate}.psi.1", self.conv(f"{gate}.psi.0", both.relu())).sigmoid()
            v = up + x * psi
        pools = v.mean((2, 3), keepdim=True), v.amax((2, 3), keepdim=True)
        attention = [self.conv(f"decoder.CA{number}.fc1", pool).relu() for pool in pools]
        v = v * sum(self.conv(f"decoder.CA{number}.fc2", x) for x in attention).sigmoid()
        pools = torch.cat([v.mean(1, keepdim=True), v.amax(1, keepdim=True)], dim=1)
        v = v * self.conv("decoder.SA.conv1", pools).sigmoid()
        for i in (0, 3):
            name = f"decoder.ConvBlock{number}.conv"
            v = self.norm(f"{name}.{i + 1}", self.conv(f"{name}.{i}", v)).relu()
        return v


@pytest.mark.parametrize("features", [("res2", "res3", "res4", "res5"), ("res5", "res6")])
@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("size", [(64, 128), (77, 130)])
def test_maps_are_those_of_the_formulas(features, extra, size):
    neck, images = make(*features, extra_convs=extra).double(), torch.randn(2, 3, *size).double()
    formulas = Formulas(neck.state_dict())
    expected, coarser = [], None
    with torch.no_grad():
        found, maps = neck(images), neck.bottom_up(images)
        for number, name in zip(range(len(features), 0, -1), reversed(features), strict=True):
            lateral = formulas.conv(f"fpn_lateral{name[-1]}", maps[name])
            coarser = formulas.level(number, lateral, coarser)
            expected.insert(0, coarser)
        x, top = maps[features[-1]], int(features[-1][-1])
        for level in range(top + 1, top + 1 + extra):
            x = formulas.conv(f"top_block.p{level}", x, stride=2)
            expected.append(x)
        if not extra:
            expected.append(expected[-1][:, :, ::2, ::2])
    first = int(features[0][-1])
    assert list(found) == [f"p{level}" for level in range(first, first + len(expected))]
    assert neck.strides == {name: 2 ** int(name[1:]) for name in found}
    assert neck.size_divisibility == 2**top
    torch.testing.assert_close(list(found.values()), expected)


@pytest.mark.parametrize("extra", [0, 2])
def test_what_no_map_that_is_read_depends_on_is_frozen_and_nothing_else(extra):
    """Every choice of maps, against the gradients."""
    plain = make("res3", "res4", "res5", extra_convs=extra).train()
    maps = plain(torch.randn(2, 3, 64, 128))
    names = list(maps)
    needed = {}
    for name, x in maps.items():
        plain.zero_grad()
        x.square().sum().backward(retain_graph=True)
        needed[name] = {key for key, p in plain.named_parameters() if p.grad is not None}
    for count in range(1, len(names) + 1):
        for read in itertools.combinations(names, count):
            neck = copy.deepcopy(plain)
            neck.freeze_unread(read)
            trained = {key for key, p in neck.named_parameters() if p.requires_grad}
            assert trained == set.union(*(needed[name] for name in read)), read


@pytest.mark.parametrize("extra", [0, 2])
def test_laterals_and_outputs_are_all_layers_and_only_the_first_see_the_trunk(extra):
    neck = make("res3", "res4", "res5", extra_convs=extra)
    laterals, outputs = neck.laterals_and_outputs()
    parameters = [p for layer in (*laterals, *outputs) for p in layer.parameters()]
    assert len(parameters) == len(set(parameters)) == len(list(neck.parameters())) - 1
    widths = neck.bottom_up.channels.values()  # no other layer has them
    takers = {m for m in neck.modules() if isinstance(m, nn.Conv2d) and m.in_channels in widths}
    assert set(laterals) == takers


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_folding_and_winograd_change_nothing(layout):
    neck = make("res2", "res3", "res4", out_channels=192).to(memory_format=layout)
    images = torch.randn(1, 3, 96, 128).contiguous(memory_format=layout)
    with torch.no_grad():
        expected = neck(images)
        # Two in each block, one after each upsampling, three in each gate.
        assert fold_norms(neck) == 3 * 2 + 2 + 2 * 3
        neck.requires_grad_(False)
        assert use_winograd(neck) == 3 * 2 + 2
        found = neck(images)
    assert any(m._is_faster(expected["p2"]) for m in neck.modules() if type(m) is WinogradConv2d)
    for name, x in expected.items():
        assert (found[name] - x).norm() < 1e-4 * x.norm()


def test_bfloat16_and_autocast_stay_near():
    neck, images = make("res2", "res3", "res4"), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = neck(images)
        with torch.autocast("cpu", torch.bfloat16):
            cast = neck(images)
        maps = neck.bfloat16()(images.bfloat16())
    for name, x in expected.items():
        assert maps[name].dtype == torch.bfloat16
        for rounded in (maps[name], cast[name]):
            assert (rounded - x).norm() < 0.1 * x.norm()


def test_an_exported_program_takes_images_of_any_size():
    model = Listed(make("res2", "res3", "res4")).eval()
    sides = {i: torch.export.Dim(f"side{i}", min=2, max=65536) for i in (2, 3)}
    with torch.no_grad(), symbolic_config.patch(backed_size_oblivious=True):
        program = torch.export.export(
            model,
            (torch.randn(1, 3, 150, 211),),
            dynamic_shapes=(sides,),
            prefer_deferred_runtime_asserts_over_guards=True,
        ).module()
        for size in ((32, 32), (70, 200)):
            images = torch.randn(1, 3, *size)
            torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("features", "width", "message"),
    [
        (("res2", "res4"), C, "neighbouring levels"),
        (("res5",), C, "two levels"),
        (("res4", "res5"), 8, "16 channels or more: 8"),
    ],
)
def test_bad_arguments(features, width, message):
    with pytest.raises(ValueError, match=message):
        CascadeFPN(Maps(*features), out_channels=width)

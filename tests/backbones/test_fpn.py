"""The pyramid against torchvision's, with the same weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from cascade_det.backbones import FPN

CHANNELS = {"res2": 4, "res3": 6, "res4": 8}
FORMATS = (torch.contiguous_format, torch.channels_last)


class Maps(nn.Module):
    """A trunk that returns the same maps for every image."""

    out_features = tuple(CHANNELS)
    channels = CHANNELS

    def __init__(self, images, height, width, *, memory_format):
        super().__init__()
        sizes = [(4 * height, 4 * width), (2 * height, 2 * width), (height, width)]
        self.maps = {
            name: torch.randn(images, channels, *size).contiguous(memory_format=memory_format)
            for (name, channels), size in zip(CHANNELS.items(), sizes, strict=True)
        }

    def forward(self, images):
        return dict(self.maps)


def torchvision_pyramid(fpn):
    """Its maps by our names; images are not looked at."""
    peer = FeaturePyramidNetwork(
        list(CHANNELS.values()), fpn.out_channels, extra_blocks=LastLevelMaxPool()
    )
    for i, level in enumerate(fpn.levels):
        for ours, theirs in (("lateral", peer.inner_blocks), ("output", peer.layer_blocks)):
            state = fpn.get_submodule(f"fpn_{ours}{level}").state_dict()
            theirs[i][0].load_state_dict(state)
    return dict(zip(fpn.strides, peer(fpn.bottom_up.maps).values(), strict=True))


@settings(max_examples=40)
@given(
    images=st.integers(1, 3),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    memory_format=st.sampled_from(FORMATS),
    grad=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_maps_are_those_of_torchvision(images, height, width, memory_format, grad, seed):
    torch.manual_seed(seed)
    fpn = FPN(Maps(images, height, width, memory_format=memory_format), out_channels=5)
    fpn = fpn.to(memory_format=memory_format)
    expected = torchvision_pyramid(fpn)
    with torch.set_grad_enabled(grad):
        found = fpn(torch.empty(0))
    assert found.keys() == expected.keys()
    for name, map_ in found.items():
        torch.testing.assert_close(map_, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_an_average_halves_what_comes_together(memory_format):
    torch.manual_seed(0)
    trunk = Maps(2, 2, 3, memory_format=memory_format)
    fpn = FPN(trunk, out_channels=5, fuse_type="avg").to(memory_format=memory_format)
    with torch.no_grad():
        found = fpn(torch.empty(0))["p3"]
        coarser, lateral = (
            fpn.fpn_lateral4(trunk.maps["res4"]),
            fpn.fpn_lateral3(trunk.maps["res3"]),
        )
        enlarged = coarser.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        expected = fpn.fpn_output3((lateral + enlarged) / 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_maps_of_the_trunk_stay_as_they_are(memory_format):
    torch.manual_seed(0)
    trunk = Maps(1, 2, 2, memory_format=memory_format)
    before = {name: map_.clone() for name, map_ in trunk.maps.items()}
    with torch.no_grad():
        FPN(trunk, out_channels=5).to(memory_format=memory_format)(torch.empty(0))
    for name, map_ in trunk.maps.items():
        assert map_.equal(before[name])


def test_further_levels_are_strided_convolutions_of_the_trunks_coarsest_map():
    """One after another, without activations; the other maps stay as they are."""
    trunk = Maps(2, 3, 5, memory_format=torch.contiguous_format)
    fpn = FPN(trunk, out_channels=5, extra_convs=2)
    fewer = FPN(trunk, out_channels=5)
    fewer.load_state_dict(fpn.state_dict(), strict=False)
    x = trunk.maps["res4"]
    with torch.no_grad():
        for conv in fpn.top_block.children():
            conv.bias.normal_()
        maps, others = fpn(torch.empty(0)), fewer(torch.empty(0))
        for name in ("p5", "p6"):
            conv = fpn.top_block.get_submodule(name)
            x = nn.functional.conv2d(x, conv.weight, conv.bias, stride=2, padding=1)
            torch.testing.assert_close(maps.pop(name), x)
    assert maps.keys() == others.keys() - {"p5"}
    assert all(map_.equal(others[name]) for name, map_ in maps.items())

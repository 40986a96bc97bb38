"""The CASCADE decoder and its blocks against the official ones, and what holds for any."""

import parity
import pytest
import torch
from torch import nn

from cascade_det.backbones.cascade_decoder import CascadeDecoder
from cascade_det.backbones.decoder_blocks import (
    AttentionGate,
    ChannelAttention,
    ConvBlock,
    SpatialAttention,
    UpConv,
)

BLOCKS = {
    "attention_gate": lambda: AttentionGate(16, 8),
    "channel_attention": lambda: ChannelAttention(32),
    "spatial_attention": SpatialAttention,
    "conv_block": lambda: ConvBlock(16, 8),
    "up_conv": lambda: UpConv(16, 8),
}
PUBLISHED = {"pvtv2_b2": (512, 320, 128, 64), "maxvit_small": (768, 384, 192, 96)}


@pytest.mark.parametrize("name", BLOCKS)
def test_official_blocks(name):
    parity.check(name, BLOCKS[name]().train())


def test_official_decoder():
    decoder = CascadeDecoder((40, 32, 24, 16))
    parity.check("cascade_decoder_add", decoder, lambda *maps: decoder(maps[::-1]))


def test_official_concatenation():
    """There are no numbers of its training pass."""
    decoder = CascadeDecoder((40, 32, 24, 16), fuse="concat").eval()
    tensors = parity.vectors("cascade_decoder_concat")
    decoder.load_state_dict(parity.state(tensors))
    with torch.no_grad():
        found = decoder([tensors[name] for name in reversed(parity.inputs_of(tensors))])
    for i, output in enumerate(found):
        parity.assert_near(output, tensors[f"output.{i}"], 2e-5)


@pytest.mark.parametrize("encoder", PUBLISHED)
@pytest.mark.parametrize("fuse", ["add", "concat"])
def test_official_names_and_shapes(fuse, encoder):
    paper, gate = ("merit", None) if fuse == "add" else ("cascade", 32)
    expected = parity.description("state_dict_shapes")[f"decoder_{paper}_{fuse}_{encoder}"]
    decoder = CascadeDecoder(PUBLISHED[encoder], fuse=fuse, finest_gate=gate)
    found = {name: list(tensor.shape) for name, tensor in decoder.state_dict().items()}
    assert found == expected["state_dict"]


def test_a_gate_of_ones_is_plain_addition():
    decoder = CascadeDecoder((32, 16)).eval()
    coarser, skip = torch.randn(2, 32, 3, 5), torch.randn(2, 16, 7, 9)
    nn.init.zeros_(decoder.AG1.psi[1].weight)
    nn.init.constant_(decoder.AG1.psi[1].bias, 100.0)
    with torch.no_grad():
        torch.testing.assert_close(
            decoder.fused(1, coarser, skip), decoder.Up1(coarser, (7, 9)) + skip
        )


@pytest.mark.parametrize("fuse", ["add", "concat"])
@pytest.mark.parametrize("sizes", [[(1, 1), (2, 3)], [(2, 3), (3, 6), (7, 11), (15, 21), (16, 80)]])
def test_any_levels_and_sizes(fuse, sizes):
    """A batch is its images one by one, in the sizes of the skips."""
    channels = [16 + 8 * i for i in range(len(sizes))]
    decoder = CascadeDecoder(channels, fuse=fuse).eval()
    maps = [torch.randn(2, c, *size) for c, size in zip(channels, sizes, strict=True)]
    with torch.no_grad():
        found = decoder(maps)
        alone = [decoder([x[i : i + 1] for x in maps]) for i in range(2)]
    for level, x in enumerate(found):
        assert x.shape == maps[level].shape
        one_by_one = torch.cat([maps_of_one[level] for maps_of_one in alone])
        torch.testing.assert_close(x, one_by_one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": (64,)}, "two levels"),
        ({"channels": (64, 8)}, "16 channels or more: 8"),
        ({"channels": (64, 32), "fuse": "sum"}, "'sum'; known: add, concat"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CascadeDecoder(**arguments)

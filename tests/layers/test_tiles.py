"""Maps that are computed in tiles, against the same convolutions of whole maps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cascade_det.layers import tiles as tiles_module
from cascade_det.layers.conv_norm import ConvNorm
from cascade_det.layers.int8 import Grid, Int8Conv2d, multiplies_int8_exactly
from cascade_det.layers.tiles import TILE, TiledMap, as_tensor
from cascade_det.layers.windows import convolve_windows, takes_windows
from cascade_det.layers.winograd import WinogradConv2d
from cascade_det.layers.winograd_blocks import convolve_blocks

# Largest difference from the whole map, relative to its largest number. 8 bits multiply exactly.
BOUNDS = {"plain": 1e-5, "norm": 1e-5, "winograd": 1e-5, "bfloat16": 2**-7, "int8": 0.0}
BOUNDS["winograd, converted later"] = 2**-7


def make_conv(kind, channels=16, out_channels=24):
    if kind == "int8" and not multiplies_int8_exactly():
        pytest.skip("this CPU does not multiply 8 bits exactly")
    conv = nn.Conv2d(channels, out_channels, 3, padding=1)
    if kind == "norm":
        conv = ConvNorm(channels, out_channels, 3, norm="BN")
        nn.init.uniform_(conv.norm.running_mean, -1, 1)
        nn.init.uniform_(conv.norm.running_var, 0.5, 2)
    if kind == "winograd":
        return WinogradConv2d(conv).eval()
    if kind == "winograd, converted later":
        return WinogradConv2d(conv).eval().to(torch.bfloat16)
    if kind == "int8":
        return Int8Conv2d(conv, Grid.of_range(-3.0, 4.0))
    return conv.eval().to(torch.bfloat16 if kind == "bfloat16" else torch.float32)


def make_map(kind, shape):
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    return x.to(torch.bfloat16) if BOUNDS[kind] == 2**-7 else x


def make_tiled(kind, shape=(2, 16, 24, 32)):
    """A map whose tiles are NaN until they are computed, and the whole one."""
    conv, x = make_conv(kind), make_map(kind, shape)
    whole = conv(x)
    out = torch.full_like(whole, torch.nan, memory_format=torch.channels_last)
    return TiledMap(x, conv, out), whole, conv


def by_cell(tiles):
    """Bool ``[N, P, Q]`` as ``[N, 1, H, W]``."""
    return tiles.repeat_interleave(TILE, 1).repeat_interleave(TILE, 2)[:, None]


def assert_near(got, wanted, bound):
    difference = (got.double() - wanted.double()).abs().max()
    assert difference <= bound * wanted.abs().max()


@pytest.mark.parametrize("kind", BOUNDS)
@torch.no_grad()
def test_windows_are_cut_out_of_the_whole_map(kind):
    conv, x = make_conv(kind), make_map(kind, (3, 16, 14, 14))
    assert takes_windows(conv)
    assert_near(convolve_windows(x, conv), conv(x)[:, :, 1:-1, 1:-1], BOUNDS[kind])


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, padding=1, stride=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        ConvNorm(32, 32, 3, norm="GN"),  # its statistics are of the whole map
        ConvNorm(4, 4, 3, norm="BN").train(),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)),
    ],
    ids=["1x1", "stride", "reflected", "GN", "training", "sequence"],
)
def test_other_layers_do_not_take_windows(conv):
    assert not takes_windows(conv)


@pytest.mark.parametrize("kind", BOUNDS)
@torch.no_grad()
def test_maps_are_computed_anew_to_the_bit_and_other_images_stay(kind):
    conv, source = make_conv(kind), make_map(kind, (2, 16, 24, 32))
    whole = conv(source)
    out = torch.full_like(whole, torch.nan, memory_format=torch.channels_last)
    tiled, wanted = TiledMap(source, conv, out), torch.rand(2, 3, 4) < 0.4
    tiled.compute(wanted)
    table = torch.zeros(2 * 24 * 32, 24, dtype=whole.dtype)
    tiled.also_write_to(table, torch.tensor([0, 24 * 32]))
    second = tiled.data[1].clone()
    alone = conv(source[:1])
    assert torch.equal(tiled.recompute([True, False])[0], alone[0])
    assert torch.equal(tiled.data[1].nan_to_num(7.0), second.nan_to_num(7.0))
    assert torch.equal(tiled.recompute([True, True]), whole)
    assert torch.equal(tiled.computed, wanted)  # what was counted
    assert not table.any()  # of a pass that is over


@pytest.mark.parametrize("kind", BOUNDS)
@torch.no_grad()
def test_tiles_are_those_of_the_whole_map(kind):
    tiled, whole, _ = make_tiled(kind)
    wanted = torch.rand(2, 3, 4) < 0.4
    wanted[:, 0, 0] = wanted[:, -1, -1] = True  # at the corners of the map
    tiled.compute(wanted)
    assert torch.equal(tiled.computed, wanted)
    cells = by_cell(wanted).expand_as(whole)
    assert_near(tiled.data[cells], whole[cells], BOUNDS[kind])
    assert tiled.data[~cells].isnan().all()


@pytest.mark.parametrize("kind", BOUNDS)
@torch.no_grad()
def test_a_map_with_all_tiles_is_the_whole_one_to_the_bit(kind):
    tiled, whole, _ = make_tiled(kind)
    assert torch.equal(as_tensor(tiled), whole)
    assert tiled.computed.all()


@pytest.mark.parametrize("share", [0.4, 1.0])
@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("next_kind", ["plain", "winograd"])
@torch.no_grad()
def test_a_next_convolution_reads_tiles_and_what_is_beside_them(kind, next_kind, share):
    tiled, whole, _ = make_tiled(kind)
    conv = make_conv(next_kind, 24, 8)
    tiles = torch.rand(2, 3, 4) < share
    tiles[0, 0, 0] = tiles[1, -1, -1] = True  # at the corners of the map
    wanted = conv(whole.float()).permute(0, 2, 3, 1).flatten(0, 2)
    found = torch.full_like(wanted, torch.nan)
    for pixels, cells in tiled.convolve(conv, tiles, int(tiles.sum())):
        found[cells] = pixels
    in_tiles = by_cell(tiles).flatten()
    assert_near(found[in_tiles], wanted[in_tiles], BOUNDS[kind] or 1e-5)
    assert found[~in_tiles].isnan().all()
    assert torch.equal(tiled.computed, tiles)
    cells = by_cell(tiles).expand_as(whole)
    assert_near(tiled.data[cells], whole[cells], BOUNDS[kind])


@pytest.mark.parametrize("kind", ["plain", "winograd"])
@given(data=st.data())
@settings(max_examples=25)
@torch.no_grad()
def test_computed_tiles_stay_as_they_are(kind, data):
    tiled, whole, _ = make_tiled(kind, (1, 16, 24, 24))
    next_conv = make_conv(kind, 24)
    union = torch.zeros(1, 3, 3, dtype=torch.bool)
    for _ in range(3):
        drawn = data.draw(st.lists(st.booleans(), min_size=9, max_size=9))
        wanted = torch.tensor(drawn).view(1, 3, 3)
        union |= wanted
        before = tiled.data.clone()
        known = by_cell(tiled.computed).expand_as(whole)
        if data.draw(st.booleans()) and not tiled.as_a_whole.any():
            list(tiled.convolve(next_conv, wanted, int(wanted.sum())))
        else:
            tiled.compute(wanted)
        assert torch.equal(tiled.data[known], before[known])
    # Nearly all tiles at once are the whole map, by the convolution itself.
    assert tiled.computed.all() or torch.equal(tiled.computed, union)
    cells = by_cell(tiled.computed).expand_as(whole)
    torch.testing.assert_close(tiled.data[cells], whole[cells], rtol=0, atol=1e-5)


@torch.no_grad()
def test_nearly_all_tiles_of_one_image_are_its_whole_map():
    tiled, whole, _ = make_tiled("plain", (2, 16, 40, 40))
    wanted = torch.zeros(2, 5, 5, dtype=torch.bool)
    wanted[0] = True
    wanted[0, 2, 2] = False
    wanted[1, 4, 4] = True
    tiled.compute(wanted)
    assert torch.equal(tiled.data[0], whole[0])  # the tile that was not wanted, too
    assert tiled.computed[0].all()
    assert tiled.computed[1].sum() == 1


@pytest.mark.parametrize("kind", ["plain", "bfloat16", "winograd"])
@torch.no_grad()
def test_a_copy_of_the_map_gets_later_tiles(kind):
    tiled, whole, _ = make_tiled(kind)
    channels = whole.shape[1]
    table = torch.full((2, 10 + 24 * 32, channels), torch.nan).flatten(0, 1)
    tiled.also_write_to(table, torch.tensor([10, 20 + 24 * 32]))
    wanted = torch.zeros(2, 3, 4, dtype=torch.bool)
    wanted[0, 1, 2] = True
    wanted[1] = True
    tiled.compute(wanted)
    rows = table.view(2, -1, channels)[:, 10:].unflatten(1, (24, 32)).permute(0, 3, 1, 2)
    cells = by_cell(wanted).expand_as(whole)
    assert_near(rows[cells], whole[cells], BOUNDS[kind])
    assert table.view(2, -1, channels)[:, :10].isnan().all()
    assert rows[~cells].isnan().all()


@torch.no_grad()
def test_blocks_are_computed_once(monkeypatch):
    """Those beside an open tile too, which regions read later."""
    tiled, _, _ = make_tiled("winograd", (1, 16, 24, 32))
    next_conv, seen = make_conv("winograd", 24), []

    def spy(x, conv, blocks, *where):
        if conv is not next_conv:
            seen.extend(map(tuple, blocks.tolist()))
        convolve_blocks(x, conv, blocks, *where)

    monkeypatch.setattr(tiles_module, "convolve_blocks", spy)
    first = torch.zeros(1, 3, 4, dtype=torch.bool)
    first[0, 1, 1] = True
    list(tiled.convolve(next_conv, first, 1))
    assert sorted(seen) == [(0, row, column) for row in range(1, 5) for column in range(1, 5)]
    beside = torch.zeros_like(first)
    beside[0, 1, 1:3] = True
    tiled.compute(beside)
    assert sorted(seen[16:]) == [(0, 2, 5), (0, 3, 5)]


@torch.inference_mode()
def make_in_inference_mode():
    return make_tiled("plain")


@torch.no_grad()
def test_tiles_of_a_map_of_inference_mode_are_computed_outside_of_it():
    tiled, whole, _ = make_in_inference_mode()
    assert torch.equal(tiled.whole(), whole)


def test_what_cannot_be_computed_in_tiles():
    conv, x = make_conv("plain"), make_map("plain", (1, 16, 16, 16))
    with torch.no_grad():
        assert TiledMap.suits(x, conv)
        assert not TiledMap.suits(x[:, :, :12], conv)
        assert not TiledMap.suits(x, nn.Conv2d(16, 16, 1))
        with torch.autocast("cpu", torch.bfloat16):
            assert not TiledMap.suits(x, conv)
    assert not TiledMap.suits(x, conv)  # with gradients

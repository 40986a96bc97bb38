"""Exits of images and patches, against the whole decoder cut off at each level."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lively_heads import lively
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from cascade_det.segmentation import map_exits
from cascade_det.segmentation.head import SegmentationHead
from cascade_det.segmentation.logits import predict
from cascade_det.segmentation.map_confidence import MEASURES, image_confidence, patch_confidence
from cascade_det.segmentation.map_exits import MapExits
from cascade_det.segmentation.pixel_rows import PixelRows

CHANNELS = (64, 48, 32, 16)
DOUBLING = ((4, 5), (8, 10), (16, 20))


class GivenGates(nn.Module):
    """Channel attention that does not look at the map."""

    def __init__(self, channels):
        super().__init__()
        self.score = torch.randn(1, channels, 1, 1)
        self.fc1 = nn.Identity()

    def fc2(self, pooled):
        return (self.score / 2).expand_as(pooled)  # for the mean and for the maximum

    def forward(self, x):
        return self.score.sigmoid()


def make(fuse="add", *, levels=3, given_gates=False):
    """A head of 3 classes whose confidence varies over the map."""
    head = lively(SegmentationHead(CHANNELS[-levels:], 3, fuse=fuse))
    for module in head.heads:
        module.weight.data *= 6
    if given_gates:
        decoder = head.decoder
        for level in range(1, levels + 1):
            attention = decoder.get_submodule(f"CA{level}")
            decoder.set_submodule(f"CA{level}", GivenGates(attention.fc1.in_channels))
    return head


def parts(head):
    return head.decoder, head.heads


def make_maps(images=2, sizes=DOUBLING):
    """Random maps that are calm in places, so that neighbours are alike."""
    return [
        torch.randn(images, c, *size) * torch.rand(images, 1, *size)
        for c, size in zip(CHANNELS[-len(sizes) :], sizes, strict=True)
    ]


@torch.no_grad()
def prefixes(head, maps, size=None):
    """What the whole decoder predicts after each level, by default in the finest size."""
    logits = head(maps)
    return [
        predict(logits[: level + 1], size or maps[-1].shape[-2:]) for level in range(len(logits))
    ]


@torch.no_grad()
def confidences(head, maps, measure, patch=None):
    """After all levels but the last: of images, or of patches."""
    logits, size, found = head(maps), tuple(maps[-1].shape[-2:]), []
    for level, x in enumerate(maps[:-1]):
        so_far = predict(logits[: level + 1], x.shape[-2:])
        if patch is None:
            found.append(image_confidence(so_far, measure))
        else:
            found.append(patch_confidence(so_far, measure, size=size, patch=patch))
    return found


def first_exit(confidences, thresholds):
    """The first level whose threshold is reached, else the last."""
    levels = torch.full_like(confidences[0], len(confidences), dtype=torch.int64)
    for level in reversed(range(len(confidences))):
        levels[confidences[level] >= thresholds[level]] = level
    return levels


def splitting(first, second):
    """Thresholds by which some of five images or more leave after each level."""
    threshold = float(first.sort().values[-2:].mean())
    rest = second[first < threshold].sort().values
    return [threshold, float(rest[1:3].mean())]


def between(scores, share):
    """A threshold above about this share of the scores, so far from all that none may cross it."""
    values = scores.flatten().sort().values
    clear = (values.diff() > 1e-4).nonzero()[:, 0]
    candidates = [values[0] - 1, *(values[clear] + values[clear + 1]) / 2, values[-1] + 1]
    return float(candidates[round(share * (len(candidates) - 1))])


def at_levels(prefixes, levels):
    """``[N, K, H, W]`` of the predictions after the level of each image or pixel."""
    index = levels.view(len(levels), 1, *(levels.shape[1:] or (1, 1)))
    return torch.stack(prefixes).gather(0, index.expand_as(prefixes[0])[None])[0]


def assert_near(found, expected):
    assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("fuse", ["add", "concat"])
@pytest.mark.parametrize("settings", [{"kind": "image"}, {"kind": "patch", "patch": 8}])
def test_without_exits_it_is_the_head_bit_for_bit(settings, fuse):
    head, maps = make(fuse), make_maps()
    found = MapExits(*parts(head), thresholds=[1.1, 1.1], **settings)(maps)
    assert torch.equal(found.logits, prefixes(head, maps)[-1])
    assert found.levels.unique().tolist() == [2]
    assert found.levels.shape == {"image": (2,), "patch": (2, 2, 3)}[settings["kind"]]


SIDES = st.tuples(st.integers(1, 4), st.integers(1, 4))
DOUBLES = st.tuples(SIDES, st.integers(3, 4)).map(
    lambda drawn: [tuple(side << level for side in drawn[0]) for level in range(drawn[1])]
)
ANY = st.lists(st.tuples(st.integers(1, 24), st.integers(1, 24)), min_size=3, max_size=4).map(
    sorted
)


@settings(max_examples=40)
@given(
    sizes=DOUBLES | ANY,
    patch=st.integers(1, 9),
    fuse=st.sampled_from(["add", "concat"]),
    measure=st.sampled_from(MEASURES),
    shares=st.tuples(*[st.floats(0, 1)] * 3),
    images=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_patches_are_the_decoder_cut_off_where_they_left(
    sizes, patch, fuse, measure, shares, images, seed
):
    """Whatever their neighbours did, given equal gates of channel attention."""
    torch.manual_seed(seed)
    head, maps = make(fuse, levels=len(sizes), given_gates=True), make_maps(images, sizes)
    scores = confidences(head, maps, measure, patch)
    thresholds = [between(x, share) for x, share in zip(scores, shares, strict=False)]
    found = MapExits(
        *parts(head), thresholds=thresholds, kind="patch", patch=patch, confidence=measure
    )(maps)
    levels = first_exit(scores, thresholds)
    assert found.levels.tolist() == levels.tolist()
    height, width = sizes[-1]
    pixels = levels.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, :height, :width]
    assert_near(found.logits, at_levels(prefixes(head, maps), pixels))


@pytest.mark.parametrize(
    "sizes", [[12, 24, 48, 96], [10, 19, 37, 73], [7, 21, 42, 83], [8, 12, 15, 18]]
)
def test_a_patch_alone_reaches_all_that_it_needs(monkeypatch, sizes):
    """In maps so large that most pixels are left out, nothing reads one of these.

    What is left out reads as zero, which may be too weak to be seen in the logits.
    """
    read = PixelRows.at

    def checked(self, places):
        inside = F.pad(torch.ones(self.pixels.shape), (1, 1, 1, 1)).flatten()[places] > 0
        assert torch.isin(places[inside], self.pixels.places()).all()
        return read(self, places)

    monkeypatch.setattr(PixelRows, "at", checked)
    sizes = [(side, side) for side in sizes]
    head, maps = make(levels=4, given_gates=True), make_maps(1, sizes)
    exits = MapExits(*parts(head), thresholds=[0.5] * 3, kind="patch")
    correct = prefixes(head, maps)
    for exits.patch in (1, 2, 3, 5):
        for _ in range(4):
            grid = [math.ceil(side / exits.patch) for side in sizes[-1]]
            sure = torch.ones(1, *grid)
            sure.view(-1)[torch.randint(sure.numel(), (1,))] = 0
            monkeypatch.setattr(map_exits, "patch_confidence", lambda *_, sure=sure, **__: sure)
            found = exits(maps)
            levels = found.levels.repeat_interleave(exits.patch, 1)
            levels = levels.repeat_interleave(exits.patch, 2)[:, : sizes[-1][0], : sizes[-1][1]]
            assert levels.unique().tolist() == [0, 3]
            assert_near(found.logits, at_levels(correct, levels))


@pytest.mark.parametrize("fuse", ["add", "concat"])
def test_dense_gates_are_exact_until_some_of_the_coarser_map_is_missing(fuse):
    head, maps = make(fuse), make_maps()
    scores = confidences(head, maps, "max", patch=4)
    thresholds = [1.1, float(scores[1].median()) + 1e-4]
    expected = first_exit(scores, thresholds)
    assert expected.unique().tolist() == [1, 2]
    pixels = expected.repeat_interleave(4, 1).repeat_interleave(4, 2)
    correct = at_levels(prefixes(head, maps), pixels)
    exits = MapExits(
        *parts(head), thresholds=thresholds, kind="patch", patch=4, channel_gates="dense"
    )
    found = exits(maps)
    assert found.levels.tolist() == expected.tolist()
    assert_near(found.logits, correct)


def test_all_patches_leave_at_once():
    head, maps = make(), make_maps()
    calls = count(head)
    found = MapExits(*parts(head), thresholds=[0.0, 0.0], kind="patch", patch=8)(maps)
    assert torch.equal(found.logits, prefixes(head, maps)[0])
    assert found.levels.unique().tolist() == [0]
    assert calls[:2] == [("ConvBlock3", 2), ("head0", 2)]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("fuse", ["add", "concat"])
def test_images_are_the_decoder_cut_off_where_they_left(fuse, measure):
    head, maps = make(fuse), make_maps(images=5)
    scores = confidences(head, maps, measure)
    thresholds = splitting(*scores)
    levels = first_exit(scores, thresholds)
    assert levels.unique().tolist() == [0, 1, 2]
    exits = MapExits(*parts(head), thresholds=thresholds, confidence=measure)
    found = exits(maps)
    assert found.levels.tolist() == levels.tolist()
    assert_near(found.logits, at_levels(prefixes(head, maps), levels))
    for i in range(5):
        alone = exits([x[i : i + 1] for x in maps])
        assert alone.levels.tolist() == levels[i : i + 1].tolist()
        assert_near(found.logits[i : i + 1], alone.logits)


def count(head):
    """A growing list of the parts that are called, and with how many images."""
    calls = []
    for level in (3, 2, 1):
        block = head.decoder.get_submodule(f"ConvBlock{level}")
        block.register_forward_hook(
            lambda _, args, __, name=f"ConvBlock{level}": calls.append((name, len(args[0])))
        )
    for level, part in enumerate(head.heads):
        part.register_forward_hook(
            lambda _, args, __, name=f"head{level}": calls.append((name, len(args[0])))
        )
    return calls


def test_finer_levels_see_only_images_that_stay():
    head, maps = make(), make_maps(images=5)
    scores = confidences(head, maps, "max")
    thresholds = splitting(*scores)
    levels = first_exit(scores, thresholds)
    calls = count(head)
    MapExits(*parts(head), thresholds=thresholds)(maps)
    stay = [int((levels >= level).sum()) for level in (1, 2)]
    assert 5 > stay[0] > stay[1] > 0
    assert calls == [
        *[("ConvBlock3", 5), ("head0", 5)],
        *[("ConvBlock2", stay[0]), ("head1", stay[0])],
        *[("ConvBlock1", stay[1]), ("head2", stay[1])],
    ]
    calls.clear()
    found = MapExits(*parts(head), thresholds=[0.0, 0.0])(maps)
    assert found.levels.tolist() == [0] * 5
    assert calls == [("ConvBlock3", 5), ("head0", 5)]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("kind", ["image", "patch"])
def test_what_is_no_number_stays(kind, measure):
    head, maps = make(), make_maps()
    maps[0][1, :, 3, 4] = math.nan  # spreads: a decoded pixel sees 5 around it and the maximum
    exits = MapExits(*parts(head), thresholds=[0.0, 0.0], kind=kind, patch=8, confidence=measure)
    levels = exits(maps).levels
    assert levels[0].unique().tolist() == [0]
    assert levels[1].unique().tolist() == [2]


def test_bad_arguments():
    with pytest.raises(ValueError, match="'pixel'; known: image, patch"):
        MapExits(*parts(make()), thresholds=[1.0, 1.0], kind="pixel")
    with pytest.raises(ValueError, match="'none'; known: computed, dense"):
        MapExits(*parts(make()), thresholds=[1.0, 1.0], channel_gates="none")
    with pytest.raises(ValueError, match=r"3 levels need 2 thresholds: \[0.5\]"):
        MapExits(*parts(make()), thresholds=[0.5])(make_maps())

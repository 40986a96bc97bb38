"""The tile gate of a detector, against dense maps whose closed tiles propose nothing."""

import copy

import pytest
import torch
from small_cascades import assert_same_detections
from small_detectors import make_detector, make_masks, random_image

from cascade_det.core import ExitPolicy, PartTimer
from cascade_det.errors import ConfigError
from cascade_det.layers.rpn_head import best_anchors
from cascade_det.layers.tile_gate import open_tiles, tile_scores
from cascade_det.layers.tiles import TILE, TiledMap
from cascade_det.standalone import build_detector, optimize

SIZES = ((128, 192), (96, 160), (160, 96))
LOWEST, NONE = 1e-30, 1.0


def exits(threshold, **rules):
    return ExitPolicy(num_stages=3, tile_threshold=threshold, **rules)


def batch_of(sizes=SIZES):
    return [{"image": random_image(*size, seed=seed)} for seed, size in enumerate(sizes)]


def gated(detector, threshold, **rules):
    detector = copy.deepcopy(detector)
    detector.set_exits(exits(threshold, **rules))
    return detector


@torch.no_grad()
def quantile(detector, batch, share):
    """A threshold that this share of the cells of ``p3`` does not reach."""
    maps = detector.backbone(detector.preprocess([s["image"] for s in batch])[0])
    logits, _ = detector.proposal_generator.rpn_head([maps["p3"]])
    return float(logits[0].sigmoid().quantile(share))


class Dense(torch.nn.Module):
    """An RPN head on whole maps, with logits of minus infinity in closed tiles."""

    def __init__(self, head, threshold):
        super().__init__()
        self.head, self.threshold = head, threshold

    def best(self, features, most, **_):
        hidden = self.head.convs[0](features[1]).relu()
        logits = self.head.objectness_logits(hidden).amax(dim=1)
        self.opened = open_tiles(tile_scores(logits), self.threshold)
        logits, deltas = self.head(features)
        closed = ~self.opened.repeat_interleave(TILE, 1).repeat_interleave(TILE, 2)
        anchors = self.head.objectness_logits.out_channels
        logits[0] = logits[0].masked_fill(
            closed.flatten(1).repeat_interleave(anchors, 1), -torch.inf
        )
        return [best_anchors(x, d, most) for x, d in zip(logits, deltas, strict=True)]


def dense_twin(detector, threshold):
    twin = copy.deepcopy(detector)
    twin.set_exits(None)
    twin.proposal_generator.rpn_head = Dense(twin.proposal_generator.rpn_head, threshold)
    return twin


# Of all images some tiles, of one all and of the others some, none.
OPEN = {"few": 0.999, "mixed": 0.99, "none": None}


@pytest.mark.parametrize("which", OPEN)
@pytest.mark.parametrize("masks", [False, True])
def test_closed_tiles_propose_nothing_and_all_else_is_as_on_whole_maps(which, masks):
    detector = make_detector(masks=make_masks() if masks else None)
    batch, share = batch_of(), OPEN[which]
    threshold = NONE if share is None else quantile(detector, batch, share)
    twin = dense_twin(detector, threshold)
    expected = twin.detect(batch)
    got = gated(detector, threshold).detect(batch)
    assert_same_detections(got.detections, expected.detections)
    assert got.stats.entered == expected.stats.entered
    opened = twin.proposal_generator.rpn_head.opened
    assert got.stats.tiles == opened.numel()
    assert got.stats.tiles_open == opened.sum()
    assert got.stats.tiles_open <= got.stats.tiles_computed <= got.stats.tiles
    assert opened.any() == (which != "none")
    assert opened.flatten(1).all(dim=1).any() == (which == "mixed")
    dense = detector.detect(batch)
    assert dense.stats.tiles == 0
    boxes = [torch.cat([d.boxes for d in x.detections]) for x in (dense, got)]
    assert not torch.equal(*boxes)


@pytest.mark.parametrize("fast", [False, True])
def test_all_tiles_open_is_the_dense_detector_to_the_bit(fast):
    detector = make_detector()
    if fast:
        optimize(detector, dtype="float32")
    batch = batch_of()
    expected = detector.detect(batch)
    got = gated(detector, LOWEST).detect(batch)
    assert_same_detections(got.detections, expected.detections, exact=True)
    assert got.stats.tiles_open == got.stats.tiles_computed == got.stats.tiles > 0


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("which", ["mixed", "none", "all"])
def test_a_batch_is_its_images(which, fast):
    # Of one size: padding changes what a network computes.
    batch = batch_of([(128, 192)] * 3)
    batch[0]["image"] //= 8  # one of them opens other tiles than the others
    detector = make_detector()
    if fast:
        optimize(detector, dtype="float32")
    threshold = {"none": NONE, "all": LOWEST}.get(which)
    detector = gated(detector, threshold or quantile(make_detector(), batch, OPEN["mixed"]))
    together = detector.detect(batch)
    alone = [detector.detect([sample]) for sample in batch]
    assert_same_detections(together.detections, [one.detections[0] for one in alone])
    assert together.stats.tiles_open == sum(one.stats.tiles_open for one in alone)
    counts = torch.tensor([one.stats.entered for one in alone])
    assert together.stats.entered == counts.sum(dim=0).tolist()


def test_regions_that_left_before_the_first_stage_compute_no_tiles():
    detector, batch = make_detector(), batch_of()
    all_regions = gated(detector, NONE).detect(batch).stats
    few = gated(detector, NONE, region_budget=(1, 1, 1)).detect(batch).stats
    assert few.tiles_computed < all_regions.tiles_computed


def test_tiles_are_a_part_of_the_time_of_their_own():
    detector, batch = gated(make_detector(), NONE), batch_of()
    timer = PartTimer()
    stats = detector.detect(batch, timer=timer).stats
    assert stats.milliseconds["tile gate"] > 0


def test_other_methods_see_whole_maps():
    detector = gated(make_detector(), NONE)
    inputs = detector.cascade_inputs(batch_of())
    assert not any(isinstance(x, TiledMap) for x in inputs.features)
    detector.set_exits(None)
    assert detector.detect(batch_of()).stats.tiles == 0


class OtherPyramid(torch.nn.Module):
    """Whole maps alone, as of the other decoders."""

    def __init__(self, pyramid):
        super().__init__()
        self.pyramid, self.size_divisibility = pyramid, pyramid.size_divisibility

    def forward(self, images):
        return self.pyramid(images)


def test_parts_that_take_no_tiles_compute_whole_maps():
    """Exits that are set later; a configuration with them is refused."""
    two_convolutions, other = make_detector(), make_detector()
    head = two_convolutions.proposal_generator.rpn_head
    head.conv = torch.nn.Sequential(head.conv, copy.deepcopy(head.conv))
    other.backbone = OtherPyramid(other.backbone)
    for detector in (two_convolutions, other):
        batch = batch_of([(128, 192)])
        wanted = detector.detect(batch).detections
        got = gated(detector, NONE).detect(batch)
        assert_same_detections(got.detections, wanted, exact=True)
        assert got.stats.tiles_computed == got.stats.tiles


def test_no_regions_at_all():
    detector = gated(make_detector(proposals=0), NONE)
    output = detector.detect(batch_of())
    assert [len(found) for found in output.detections] == [0, 0, 0]
    assert output.stats.tiles_computed == 0


def test_a_pyramid_with_norms_over_whole_maps_is_refused(instant_cfg):
    instant_cfg.merge_from_list(["MODEL.FPN.NORM", "GN"])
    instant_cfg.MODEL.CASCADE.EXIT.TILE_THRESHOLD = 0.1
    with pytest.raises(ConfigError, match=r"MODEL\.FPN\.NORM is 'GN', but .*TILE_THRESHOLD"):
        build_detector(instant_cfg)

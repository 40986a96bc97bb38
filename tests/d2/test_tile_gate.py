"""The tile gate of optimised models of Detectron2, beside dense ones and the standalone host."""

import copy
import logging
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.modeling import GeneralizedRCNNWithTTA
from two_hosts import (
    BACKBONES,
    EVERY,
    EXITS,
    FAST_KERNEL,
    MASKS,
    build_two,
    in_detectron2,
    make_batch,
)

from cascade_det import standalone
from cascade_det.core import PartTimer
from cascade_det.d2 import EarlyExitCascadeROIHeads, optimize
from cascade_det.d2.detector import Detector
from cascade_det.layers.int8 import multiplies_int8_exactly
from cascade_det.layers.rpn_head import BestAnchors, RPNHead
from cascade_det.layers.tile_gate import tile_scores

pytestmark = pytest.mark.needs_detectron2

KEY = "MODEL.CASCADE.EXIT.TILE_THRESHOLD"
OPTIONS = (
    *(*BACKBONES["R-18"], *FAST_KERNEL, *EXITS, KEY, 0.5),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", 25),  # which leave tiles that no region reads
)
WIDE = ("MODEL.FPN.OUT_CHANNELS", 256)  # Winograd's convolutions
NO_TILES = "TILE_THRESHOLD is 0.5, but the finest map is computed as a whole"
SIZES = ((250, 320), (256, 300))  # 8 x 10 tiles
ALL_OPEN = 1e-6


def build(*options):
    """Both hosts, with an objectness that differs from place to place."""
    ours, alone = build_two(*OPTIONS, *options)
    weight = ours.model.proposal_generator.rpn_head.objectness_logits.weight
    torch.nn.init.normal_(weight, std=0.1)
    alone.model.load_state_dict(ours.model.state_dict())
    return ours.model.eval(), alone.model.eval()


def batch(count=2):
    return make_batch(count, sizes=SIZES)


@contextmanager
def threshold(value, *models):
    exits = [model.roi_heads.exits for model in models]
    before = [x.tile_threshold for x in exits]
    for x in exits:
        x.tile_threshold = value
    yield
    for x, old in zip(exits, before, strict=True):
        x.tile_threshold = old


@torch.no_grad()
def score_of_share(model, share):
    """The threshold from which a share of the tiles is open."""
    maps = model.backbone(model.preprocess_image(batch()).tensor)
    (logits,), _ = model.proposal_generator.rpn_head([maps["p3"]])
    per_cell = logits.view(len(logits), *maps["p3"].shape[2:], -1).amax(dim=3)
    return float(tile_scores(per_cell).flatten().quantile(1 - share))


def detect(model):
    """Detections and counts."""
    output = (model if hasattr(model, "detect") else Detector(model)).detect(batch())
    return output.detections, output.stats


def assert_equal(got, wanted):
    for ours, theirs in zip(got, wanted, strict=True):
        for name in ("boxes", "scores", "classes", "exit_stages"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))


@pytest.fixture(scope="module")
def plain():
    return build(*WIDE)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8"])
def hosts(request, plain):
    """Both hosts, optimised, and thresholds that open some tiles and none."""
    if request.param == "int8" and not multiplies_int8_exactly():
        pytest.skip("this CPU does not multiply 8 bits exactly")
    images = [batch(1)] if request.param == "int8" else None
    ours, alone = (copy.deepcopy(model) for model in plain)
    scores = [score_of_share(ours, share) for share in (0.3, 0.1)]
    optimize(ours, dtype=request.param, images=images)
    standalone.optimize(alone, dtype=request.param, images=images)
    return ours, alone, (*scores, 1.0)


@pytest.fixture(scope="module")
def gated(plain):
    """Optimised, with a threshold that opens some tiles."""
    model = copy.deepcopy(plain[0])
    model.roi_heads.exits.tile_threshold = score_of_share(model, 0.3)
    return optimize(model, dtype="float32")


def test_both_hosts_detect_alike(hosts):
    ours, alone, thresholds = hosts
    shares = []
    for value in thresholds:
        with threshold(value, ours, alone):
            (found, stats), (wanted, wanted_stats) = detect(ours), detect(alone)
        assert stats == wanted_stats
        assert_equal(found, wanted)
        assert min(map(len, found)) > 3
        assert stats.tiles_open <= stats.tiles_computed < stats.tiles == 2 * 8 * 10
        shares.append(stats.tiles_open / stats.tiles)
    assert 0.5 > shares[0] > shares[1] > shares[2] == 0


def test_with_all_tiles_open_it_is_the_dense_model(hosts):
    model = hosts[0]
    with threshold(ALL_OPEN, model):
        found, stats = detect(model)
    assert stats.tiles_open == stats.tiles_computed == stats.tiles > 0
    with threshold(0.0, model):
        wanted, dense = detect(model)
    assert dense.tiles == dense.tiles_open == dense.tiles_computed == 0
    assert_equal(found, wanted)


def test_without_open_tiles_no_proposal_is_of_the_finest_map(gated, monkeypatch):
    """As if all anchors of the finest map had the least objectness."""
    with threshold(1.0, gated):
        found, _ = detect(gated)
    best = RPNHead.best

    def without_finest(self, features, most, **options):
        finest, *others = best(self, features, most)
        return [BestAnchors(torch.full_like(finest[0], -torch.inf), *finest[1:]), *others]

    monkeypatch.setattr(RPNHead, "best", without_finest)
    with threshold(0.0, gated):
        wanted, _ = detect(gated)
    for ours, theirs in zip(found, wanted, strict=True):
        assert len(ours) == len(theirs) > 3
        torch.testing.assert_close(ours.boxes, theirs.boxes, rtol=0, atol=0.01)
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-4)


def test_computed_tiles_are_those_of_the_whole_map(gated):
    maps = []
    hook = gated.proposal_generator.register_forward_hook(lambda _, inputs, __: maps.append(inputs))
    detect(gated)
    hook.remove()
    finest = maps[0][1]["p2"]
    with torch.no_grad(), threshold(0.0, gated):
        whole = gated.backbone(gated.preprocess_image(batch()).tensor)["p2"]
    cells = finest.computed.repeat_interleave(8, 1).repeat_interleave(8, 2)
    got, wanted = (x.permute(0, 2, 3, 1)[cells] for x in (finest.data, whole))
    assert 0.1 < finest.computed.float().mean() < 0.95
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_batch_is_its_images(gated):
    detector, images = Detector(gated), make_batch(2, sizes=((256, 320),))
    found = detector.detect(images)
    alone = [detector.detect([image]) for image in images]
    for name in ("tiles", "tiles_open", "tiles_computed"):
        assert getattr(found.stats, name) == sum(getattr(x.stats, name) for x in alone)
    for got, wanted in zip(found.detections, (x.detections[0] for x in alone), strict=True):
        assert len(got) == len(wanted) > 3
        torch.testing.assert_close(got.boxes, wanted.boxes, rtol=0, atol=0.01)


def test_stages_times_and_the_models_own_call(gated):
    timer = PartTimer()
    output = Detector(gated).detect(batch(), stages=True, timer=timer)
    assert output.stats.milliseconds["tile gate"] > 0
    assert len(output.stages) == 3
    with torch.no_grad():
        called = gated(batch())
    for got, wanted in zip(called, output.detections, strict=True):
        assert torch.equal(got["instances"].pred_boxes.tensor, wanted.boxes)


def test_the_present_exits_of_a_model_decide(gated):
    other = copy.deepcopy(gated)
    assert not {name for name, _ in other.proposal_generator.named_modules() if "heads" in name}
    Detector(other).set_exits(None)
    assert detect(other)[1].tiles == 0
    assert detect(gated)[1].tiles > 0
    other.roi_heads.exits = copy.deepcopy(gated.roi_heads.exits)
    assert detect(other)[1] == detect(gated)[1]


def test_inputs_of_the_cascade_are_whole(gated):
    """Of which calibration records what any setting would do."""
    detector = Detector(gated)
    inputs = detector.cascade_inputs(batch())
    with threshold(0.0, gated):
        wanted = detector.cascade_inputs(batch())
    for ours, theirs in (inputs.features, wanted.features), (inputs.proposals, wanted.proposals):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("mode", ["gradients", "autocast"])
def test_where_tiles_do_not_go_the_whole_map_does(gated, mode, caplog):
    model = copy.deepcopy(gated)
    context = torch.enable_grad() if mode == "gradients" else torch.autocast("cpu", torch.bfloat16)
    with context, torch.set_grad_enabled(mode == "gradients"):
        found = [x["instances"] for x in model(batch())]
        assert model.roi_heads.stats.tiles == 0
        model.roi_heads.exits.tile_threshold = 0.0
        wanted = [x["instances"] for x in model(batch())]
    assert caplog.text.count("tiles need torch.no_grad()") == 1
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)


@pytest.mark.parametrize("masks", [MASKS, EVERY], ids=["last", "every"])
def test_masks(masks):
    augmentation = ("TEST.AUG.MIN_SIZES", (128, 160), "TEST.AUG.MAX_SIZE", 200)
    ours, alone = build_two(*OPTIONS, *masks, *augmentation)
    model = optimize(ours.model, dtype="float32")
    standalone.optimize(alone.model, dtype="float32")
    with threshold(1.0, model, alone.model):
        (found, stats), (wanted, _) = detect(model), detect(alone.model)
        assert 0 < stats.tiles_computed < stats.tiles
        for got, own in zip(found, wanted, strict=True):
            assert len(own) > 3
            torch.testing.assert_close(got.masks, own.masks, rtol=0, atol=1e-3)
        # Which gives the heads boxes, and maps that are in tiles.
        with torch.no_grad():
            (augmented,) = GeneralizedRCNNWithTTA(ours.cfg, model)(batch(1))
    assert augmented["instances"].pred_masks.any()


class OwnHeads(EarlyExitCascadeROIHeads):
    """A user's, which may read the maps."""


class TestWholeMaps:
    """Where something else reads the map, or a part cannot compute it in tiles."""

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (("MODEL.RPN.CONV_DIMS", (48, -1)), "tiles need one convolution in MODEL.RPN.CONV"),
            (("MODEL.FPN.NORM", "GN"), "tiles need no norm over whole maps in MODEL.FPN.NORM"),
            (
                ("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (16,)),
                "keypoint_head (KRCNNConvDeconvUpsampleHead) may read all of it",
            ),
            (
                (
                    *("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]),
                    *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
                    *("MODEL.RPN.IN_FEATURES", ["p4", "p5", "p6"]),
                    *("MODEL.ROI_HEADS.IN_FEATURES", ["p4", "p5"]),
                    *("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64]]),
                ),
                "tiles need four levels or more in MODEL.FPN.IN_FEATURES; p3 and p4 first in "
                "MODEL.RPN.IN_FEATURES; p3 first in MODEL.ROI_HEADS.IN_FEATURES",
            ),
            (BACKBONES["resnet_cascade"], "tiles need a backbone with an FPN"),
        ],
        ids=["convolutions", "norm", "keypoints", "levels", "pyramid"],
    )
    def test_is_said(self, options, reason, caplog):
        model = in_detectron2(*OPTIONS, *options).model
        optimize(model, dtype="float32")
        said = f"{NO_TILES}: {reason}"
        assert sum(said in sentence for sentence in model.optimizations) == 1
        assert detect(model)[1].tiles == 0
        assert NO_TILES not in caplog.text  # it is among the optimisations

    def test_with_heads_of_a_users_class(self):
        model = in_detectron2(*OPTIONS).model
        model.roi_heads.__class__ = OwnHeads
        optimize(model, dtype="float32")
        assert model.optimizations[-1].endswith("roi_heads (OwnHeads) may read all of it.")

    def test_is_told_once_where_exits_ask_later(self, caplog):
        model = in_detectron2(*OPTIONS, KEY, 0.0, "MODEL.RPN.CONV_DIMS", (48, -1)).model
        optimize(model, dtype="float32")
        detect(model)
        assert "TILE_THRESHOLD" not in "".join([*model.optimizations, caplog.text])
        model.roi_heads.exits.tile_threshold = 0.5
        detect(model)
        detect(model)
        assert caplog.text.count(f"{NO_TILES}: tiles need one convolution") == 1

    def test_a_model_that_is_not_optimised_tells_once_how_to(self, plain, caplog):
        model = copy.deepcopy(plain[0])
        with caplog.at_level(logging.WARNING, "cascade_det.d2"):
            assert detect(model)[1].tiles == 0
            detect(model)
        assert caplog.text.count(NO_TILES) == 1
        assert "cascade_det.d2.optimize() or MODEL.CASCADE.FAST.ENABLED" in caplog.text

    @pytest.mark.skipif(
        not multiplies_int8_exactly(), reason="this CPU does not multiply 8 bits exactly"
    )
    def test_detections_that_optimize_compares_with_tell_nothing(self, plain, caplog):
        model = optimize(copy.deepcopy(plain[0]), dtype="int8", images=[batch(1)])
        assert NO_TILES not in "".join([*model.optimizations, caplog.text])
        assert detect(model)[1].tiles > 0

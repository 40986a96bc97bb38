"""The learned head of the tile gate in optimised models of Detectron2, beside the other host."""

import copy

import pytest
import torch

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from small_cascades import assert_same_detections
from two_hosts import BACKBONES, EXITS, FAST_KERNEL, build_two, make_batch

from cascade_det import standalone
from cascade_det.calibration.recording import record_dataset
from cascade_det.core.postprocess import rescale_detections
from cascade_det.d2 import optimize
from cascade_det.d2.detector import Detector
from cascade_det.errors import ConfigError
from cascade_det.layers.int8 import multiplies_int8_exactly

pytestmark = pytest.mark.needs_detectron2

NODE = "MODEL.CASCADE.EXIT"
OPTIONS = (
    *(*BACKBONES["R-18"], *FAST_KERNEL, *EXITS),
    *(f"{NODE}.LEARNED", ("tile_head",), f"{NODE}.TILE_THRESHOLD", 0.5),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", 25, "MODEL.RPN.CONV_DIMS", (32,)),
)
SIZES = ((250, 320), (256, 300))


def batch():
    return [{**x, "image_id": i} for i, x in enumerate(make_batch(2, sizes=SIZES))]


@pytest.fixture(scope="module")
def plain():
    """Both hosts with a head of random weights, and thresholds that open some tiles and few."""
    ours, alone = (host.model for host in build_two(*OPTIONS))
    torch.manual_seed(1)
    torch.nn.init.normal_(ours.proposal_generator.rpn_head.objectness_logits.weight, std=0.1)
    head = ours.roi_heads.exits.learned.tile_head
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        maps = ours.eval().backbone(ours.preprocess_image(batch()).tensor)
        hidden = ours.proposal_generator.rpn_head.conv(maps["p3"])
        for _ in range(60):
            head.train()(hidden)
        scores = head.eval().probabilities(hidden).flatten()
    alone.load_state_dict(ours.state_dict())
    return ours.eval(), alone.eval(), scores.quantile(torch.tensor([0.7, 0.9])).tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_both_hosts_detect_and_record_alike(plain, dtype):
    if dtype == "int8" and not multiplies_int8_exactly():
        pytest.skip("this CPU does not multiply 8 bits exactly")
    images = [batch()[:1]] if dtype == "int8" else None
    ours, alone = (copy.deepcopy(model) for model in plain[:2])
    detector = Detector(optimize(ours, dtype=dtype, images=images))
    standalone.optimize(alone, dtype=dtype, images=images)
    thresholds = (0.0, *plain[2], 1.0)
    record, other = (
        record_dataset(x, [batch()], 2, tile_thresholds=thresholds).records[0]
        for x in (detector, alone)
    )
    assert (record.tiles.members == other.tiles.members).all()
    shares = []
    for threshold in thresholds[1:]:
        for model in (ours, alone):
            model.roi_heads.exits.tile_threshold = threshold
        found, wanted = detector.detect(batch()), alone.detect(batch())
        assert found.stats == wanted.stats
        assert_same_detections(found.detections, wanted.detections, exact=True)
        assert min(map(len, found.detections)) > 3
        replay = record.replay(ours.roi_heads.exits)
        assert replay.tiles[:2].sum() == found.stats.tiles_open
        if dtype == "float32":
            frames = [
                (size, (x["height"], x["width"])) for size, x in zip(SIZES, batch(), strict=True)
            ]
            replayed = rescale_detections(record.select(replay.reported), frames)
            assert_same_detections(replayed, found.detections)
        shares.append(found.stats.tiles_open / found.stats.tiles)
    assert 0.6 > shares[0] > shares[1] > shares[2] == 0


REFUSED = r"LEARNED is \['tile_head'\].*trained in Detectron2.*standalone host"


def test_a_model_does_not_train_it(plain):
    model = copy.deepcopy(plain[0]).train()
    with pytest.raises(ConfigError, match=REFUSED):
        model.roi_heads(None, {}, [], [])


def test_nor_does_a_run_begin(host, make_cfg):
    cfg = make_cfg(f"{NODE}.ENABLED", "True", f"{NODE}.LEARNED", "('tile_head',)")
    with pytest.raises(ConfigError, match=REFUSED):
        host.train(cfg)

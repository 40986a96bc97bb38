"""Tile thresholds in the record of an optimised model of Detectron2, beside its own runs."""

import pytest
import torch

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from small_cascades import assert_same_detections
from two_hosts import BACKBONES, EXITS, FAST_KERNEL, build_two, make_batch

from cascade_det import standalone
from cascade_det.calibration.recording import record_dataset
from cascade_det.core import ExitPolicy
from cascade_det.core.postprocess import rescale_detections
from cascade_det.d2 import optimize
from cascade_det.d2.detector import Detector

pytestmark = pytest.mark.needs_detectron2

SIZES = ((250, 320), (256, 300))


def samples():
    """Two images, one in each batch."""
    return [[{**x, "image_id": i}] for i, x in enumerate(make_batch(2, sizes=SIZES))]


@pytest.fixture(scope="module")
def hosts():
    few = ("MODEL.RPN.POST_NMS_TOPK_TEST", 25)
    ours, alone = build_two(*BACKBONES["R-18"], *FAST_KERNEL, *EXITS, *few)
    weight = ours.model.proposal_generator.rpn_head.objectness_logits.weight
    torch.nn.init.normal_(weight, std=0.1)
    alone.model.load_state_dict(ours.model.state_dict())
    return ours.model.eval(), alone.model.eval()


@pytest.fixture(scope="module")
def thresholds(hosts):
    """The whole map; few and more tiles, by the best anchors of p3; and none."""
    with torch.no_grad():
        maps = hosts[1].backbone(hosts[1].preprocess([x["image"] for (x,) in samples()])[0])
        logits, _ = hosts[1].proposal_generator.rpn_head([maps["p3"]])
    chosen = logits[0].sigmoid().flatten().quantile(torch.tensor([0.98, 0.995, 0.999]))
    return (0.0, *chosen.tolist(), 1.0)


def test_only_an_optimised_model_has_thresholds(hosts, thresholds):
    recording = record_dataset(Detector(hosts[0]), samples(), 2, tile_thresholds=thresholds)
    assert recording.tile_thresholds == ()


def test_a_replay_is_the_run_and_both_hosts_record_alike(hosts, thresholds):
    detector = Detector(optimize(hosts[0], dtype="float32"))
    alone = standalone.optimize(hosts[1], dtype="float32")
    # Exits that ask for tiles do not change what is recorded.
    detector.set_exits(ExitPolicy(num_stages=3, tile_threshold=1.0))
    recorded, wanted = (
        record_dataset(x, samples(), 2, tile_thresholds=thresholds) for x in (detector, alone)
    )
    assert recorded.tile_thresholds == thresholds
    (record,), (other,) = recorded.records, wanted.records
    assert (record.tiles.members == other.tiles.members).all()
    torch.testing.assert_close(record.proposals, other.proposals)
    shares = []
    for value in thresholds:
        policy = ExitPolicy(num_stages=3, tile_threshold=value, prune_thresholds=(0.2, 0.2))
        replay = record.replay(policy)
        found = rescale_detections(record.select(replay.reported), recorded.frames)
        detector.set_exits(policy)
        outputs = [detector.detect(batch) for batch in samples()]
        assert_same_detections(found, [output.detections[0] for output in outputs])
        for image, output in enumerate(outputs):
            assert replay.entered[:, image].tolist() == output.stats.entered
            if value > 0:
                dense, opened, _, _ = replay.tiles[:, image].tolist()
                assert output.stats.tiles_open == dense + opened
                shares.append(output.stats.tiles_open / output.stats.tiles)
    assert len(set(shares)) > 2

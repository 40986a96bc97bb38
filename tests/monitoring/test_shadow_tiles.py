"""Shadow runs of a tile gate: their RPN reads all tiles, so what the gate loses is a loss."""

from __future__ import annotations

import pytest
import torch
from small_detectors import make_detector, random_image

from cascade_det.core import ExitPolicy, PartTimer
from cascade_det.evaluation import agreement_loss
from cascade_det.monitoring.monitor import ExitMonitor
from cascade_det.monitoring.shadow import ShadowRules, image_key

# No tile is open, and all are: the small RPN finds objects in most tiles.
THRESHOLDS = [1.0, 0.5]


def gated(threshold, **exits):
    detector = make_detector()
    detector.set_exits(ExitPolicy(num_stages=3, tile_threshold=threshold, **exits))
    return detector


@pytest.fixture
def batch():
    return [{"image": random_image(96, 128, seed=i)} for i in range(3)]


def assert_same(found, wanted, **tolerance):
    for name, values in vars(wanted).items():
        torch.testing.assert_close(getattr(found, name), values, **tolerance)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_stages_are_those_of_the_detector_without_a_gate(threshold, batch):
    wanted = make_detector().detect(batch, stages=True).stages
    found = gated(threshold, prune_thresholds=(0.3, 0.3)).detect(batch, stages=True).stages
    for ours, theirs in zip(found, wanted, strict=True):
        for part in ("boxes_before", "boxes_after"):
            assert all(map(torch.equal, getattr(ours, part), getattr(theirs, part)))
        for own, other in zip(ours.detections, theirs.detections, strict=True):
            assert len(own) > 20
            assert_same(own, other, rtol=0, atol=0)


@pytest.mark.parametrize("chosen", [[True, False, True], [False, True, True], [False, False, True]])
def test_the_others_of_a_batch_take_no_part_and_the_backbone_runs_once(chosen, batch, monkeypatch):
    detector = gated(1.0)
    seen, calls = [], []
    generator = detector.proposal_generator
    propose = generator.propose
    monkeypatch.setattr(
        generator, "propose", lambda maps, sizes: seen.extend(sizes) or propose(maps, sizes)
    )
    detector.backbone.bottom_up.register_forward_hook(lambda *_: calls.append(1))
    output = detector.detect(batch, stages=chosen)
    assert (len(seen), len(calls)) == (sum(chosen), 1)
    wanted = make_detector().detect(batch, stages=chosen)
    for ours, theirs in zip(output.stages, wanted.stages, strict=True):
        assert [len(own) > 0 for own in ours.detections] == chosen
        for own, other in zip(ours.detections, theirs.detections, strict=True):
            assert_same(own, other, rtol=1e-4, atol=1e-4)
    # What was detected with exits, and counted, is as without a shadow run.
    plain = detector.detect(batch)
    assert output.stats == plain.stats
    for own, other in zip(output.detections, plain.detections, strict=True):
        assert_same(own, other, rtol=0, atol=0)


def test_objects_that_no_open_tile_proposes_are_lost(batch):
    """Without exits but the gate, so that nothing else is lost."""
    dense = make_detector().detect(batch).detections
    detector = gated(1.0)
    losses = [
        agreement_loss(early, full, min_score=0.5)
        for early, full in zip(detector.detect(batch).detections, dense, strict=True)
    ]
    assert 0 < sum(losses) / 3 < 1
    monitor = ExitMonitor(detector, shadow=ShadowRules(share=1.0, min_score=0.5))
    output = monitor.detect(batch)
    report = monitor.report()
    assert report["shadow"]["loss"] == pytest.approx(sum(losses) / 3)
    assert report["exits"]["tiles"] == {
        "per_image": 12,  # of 32 x 32 pixels
        "open_share": 0,
        "computed_share": output.stats.tiles_computed / 36,
    }
    # With all tiles open, nothing is lost.
    monitor = ExitMonitor(gated(0.5), shadow=ShadowRules(share=1.0, min_score=0.5))
    monitor.detect(batch)
    report = monitor.report()
    assert (report["shadow"]["changed"], report["exits"]["tiles"]["open_share"]) == (0, 1)


def test_lines_of_the_metrics_have_the_tiles(batch, tmp_path):
    rules = ShadowRules(share=0.5)
    with ExitMonitor(gated(1.0), shadow=rules, output_dir=tmp_path, period=2) as monitor:
        for sample in batch:
            monitor.detect([sample])
    chosen = [rules.chooses(image_key(sample, i)) for i, sample in enumerate(batch)]
    assert monitor.report()["shadow"]["images"] == sum(chosen)
    lines = (tmp_path / "metrics.json").read_text().splitlines()
    assert all('"exits/tiles/open_share": 0' in line for line in lines)
    assert all('"exits/tiles/computed_share": ' in line for line in lines)


def test_times_of_both_passes_are_apart(batch):
    timer = PartTimer()
    gated(1.0).detect(batch, stages=True, timer=timer)
    assert {"tile gate", "rpn", "full/tile gate", "full/rpn"} <= timer.milliseconds.keys()
    without = PartTimer()
    make_detector().detect(batch, stages=True, timer=without)
    assert timer.milliseconds.keys() - without.milliseconds.keys() == {
        *("tile gate", "full/tile gate", "full/rpn")
    }

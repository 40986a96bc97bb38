"""Learned exits in a real cascade: what they train, and that a run does as its replay."""

import torch
from random_records import make_parts
from small_cascades import CHANNELS, assert_same_detections, make_cascade, make_scene

from cascade_det.core.exit_losses import exit_losses
from cascade_det.core.exits import ExitPolicy


def objectness_of(scene):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(len(p), generator=generator) for p in scene.proposals]


def make_exits(parts, **thresholds):
    return ExitPolicy(num_stages=3, learned=parts, confidence="learned", **thresholds)


def test_a_cascade_trains_its_exits_and_nothing_else():
    parts = make_parts(hidden=12, crop_channels=CHANNELS)
    cascade, scene = make_cascade(exits=make_exits(parts)), make_scene()
    inputs = scene.features, scene.proposals, scene.image_sizes
    record = cascade.record(*inputs, objectness=objectness_of(scene), hidden=True)
    sum(exit_losses(parts, record, *scene.targets).values()).backward()
    trained = {name for name, p in cascade.named_parameters() if p.grad is not None}
    assert trained == {f"exits.learned.{name}" for name in parts.state_dict()}


@torch.no_grad()
def test_a_run_with_learned_exits_equals_its_replay():
    parts = make_parts(hidden=12, crop_channels=CHANNELS)
    cascade = make_cascade(exits=make_exits(parts))
    scene = make_scene(seed=5, num_proposals=(60, 40))
    inputs = scene.features, scene.proposals, scene.image_sizes
    objectness = objectness_of(scene)
    record = cascade.record(*inputs, objectness=objectness)
    views = [record.view(stage) for stage in (-1, 0, 1)]
    cascade.exits = make_exits(
        parts,
        pruner_thresholds=[parts.continue_probability(v).quantile(0.3).item() for v in views],
        thresholds=[parts.readiness(v)[v.is_foreground].median().item() for v in views[1:]],
    )
    wanted, stats = cascade.detect(*inputs, objectness=objectness)
    replayed = record.replay(cascade.exits)
    assert (replayed.stats.entered, replayed.stats.left) == (stats.entered, stats.left)
    assert_same_detections(record.select(replayed.reported), wanted)
    assert stats.entered[0] < 100
    assert {"background", "confident"} <= set(stats.left[0])

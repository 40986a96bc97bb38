"""Learned parts: features, independence of other images, names."""

import dataclasses
import math

import pytest
import torch
from random_records import CROP_CHANNELS, HIDDEN, make_parts, make_recorded_scene
from region_views import view_of_image

from cascade_det.core.exits.features import proposal_features, region_features
from cascade_det.core.exits.learned import REGION_PARTS, LearnedParts
from cascade_det.core.exits.view import RegionView

GATES = range(-1, 2)


def answers(parts, view):
    """The outputs of the parts at a gate, by name."""
    with torch.no_grad():
        by_name = {"continue": parts.continue_probability(view)}
        if view.stage >= 0:
            by_name["ready"] = parts.readiness(view)
    return by_name


def test_hand_made_features_of_one_region():
    # One box of 64 x 128 with probabilities (0.5, 0.3, 0.2), that moved by a quarter of its
    # height: IoU = 96 / 160 = 0.6.
    view = RegionView(
        stage=0,
        num_images=1,
        image_index=torch.tensor([0]),
        boxes=torch.tensor([[0.0, 32.0, 64.0, 160.0]]),
        objectness=torch.tensor([2.0]),
        boxes_before=torch.tensor([[0.0, 0.0, 64.0, 128.0]]),
        probs=torch.tensor([[0.3, 0.5, 0.2]]),
        agreements=torch.tensor([1]),
    )
    entropy = -sum(p * math.log(p) for p in (0.5, 0.3, 0.2)) / math.log(3)
    count = math.log(2) / 4
    own = [0.5, 0.0, math.log(2) / 2, 0.0, 0.0, count, 0.5, 0.0, 1.0]
    others = [0.3, 0, 0, 0, math.log(0.2 / 0.8) / 4, 0.2, entropy, 1.0, 0.6]
    torch.testing.assert_close(region_features(view), torch.tensor([own + others]))


def test_place_within_the_image():
    # Image 0 has three regions, image 1 none, image 2 two that are alike.
    scores = torch.tensor([0.2, 0.6, 0.4, 0.5, 0.5])
    view = RegionView(
        stage=-1,
        num_images=3,
        image_index=torch.tensor([0, 0, 0, 2, 2]),
        boxes=torch.tensor([[0.0, 0.0, 10.0, 10.0]]).expand(5, 4),
        objectness=torch.logit(scores),
    )
    features = proposal_features(view)
    torch.testing.assert_close(features[:, 4], torch.tensor([2 / 3, 0, 1 / 3, 0, 1 / 2]))
    torch.testing.assert_close(features[:, 6], scores)
    torch.testing.assert_close(features[:, 8], torch.tensor([0.0, 1.0, 0.5, 1.0, 1.0]))


@pytest.mark.parametrize("num_classes", [1, 3, 30])
def test_features_are_of_the_size_of_one_for_any_input(num_classes):
    record = make_recorded_scene(num_classes=num_classes).record
    record.objectness[:4] = torch.tensor([300.0, -300.0, torch.inf, -torch.inf])
    record.proposals[5] = 7.0  # an empty box
    for stage in GATES:
        view = record.view(stage)
        features = proposal_features(view) if stage < 0 else region_features(view)
        assert features.dtype == torch.float32
        assert features.isfinite().all()
        assert features.abs().max() <= 4


def test_the_number_of_classes_does_not_matter():
    """A class that never occurs leaves the answers as they are, but for the entropy's maximum."""
    view = make_recorded_scene(num_classes=3).record.view(1)
    probs = view.probs
    wider = torch.cat((probs[:, :3], torch.zeros(len(probs), 4), probs[:, 3:]), dim=1)
    got = region_features(dataclasses.replace(view, probs=wider))
    wanted = region_features(view)
    ratio = math.log(4) / math.log(8)
    wanted[:, 15] *= ratio
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("stage", GATES)
def test_images_are_independent(stage):
    view = make_recorded_scene(num_proposals=(30, 0, 1, 20), num_objects=(4, 1, 1, 0)).record.view(
        stage
    )
    parts = make_parts()
    whole = answers(parts, view)
    singles = [answers(parts, view_of_image(view, image)) for image in range(4)]
    for name, got in whole.items():
        wanted = torch.cat([single[name] for single in singles])
        torch.testing.assert_close(got, wanted)
        assert got.std() > 0.01


@pytest.mark.parametrize("stage", GATES)
def test_the_order_of_regions_does_not_matter(stage):
    view = make_recorded_scene(num_proposals=(25, 25)).record.view(stage)
    order = torch.cat((torch.randperm(25), 25 + torch.randperm(25)))
    parts = make_parts()
    ordered, shuffled = answers(parts, view), answers(parts, view[order])
    for name, got in shuffled.items():
        torch.testing.assert_close(got, ordered[name][order])


@pytest.mark.parametrize("stage", GATES)
def test_without_regions(stage):
    view = make_recorded_scene(num_proposals=(0, 0)).record.view(stage)
    for got in answers(make_parts(), view).values():
        assert got.shape == (0,)


def test_readiness_is_0_for_background():
    view = make_recorded_scene().record.view(1)
    ready = make_parts().readiness(view)
    assert 0 < view.is_foreground.sum() < len(view)
    assert ready[~view.is_foreground].eq(0).all()
    assert ready[view.is_foreground].gt(0).all()


def test_crops_and_predicted_ious_are_used_if_configured():
    scene = make_recorded_scene()
    before, after = scene.record.view(-1), scene.record.view(0)
    other_crops = dataclasses.replace(before, crops=before.crops.flip(0))
    other_ious = dataclasses.replace(after, predicted_ious=1 - after.predicted_ious)
    full, lean = make_parts(), make_parts(names=("gate", "pruner"), crop_channels=0)
    for view, changed in ((before, other_crops), (after, other_ious)):
        for name, got in answers(full, changed).items():
            assert not got.equal(answers(full, view)[name])
        for name, got in answers(lean, changed).items():
            assert got.equal(answers(lean, view)[name])


def test_predicted_iou_is_a_sigmoid_of_a_linear_layer():
    parts = make_parts()
    hidden = torch.randn(5, HIDDEN)
    layer = parts.iou_head[2]
    wanted = 1 / (1 + torch.exp(-(hidden @ layer.weight[0] + layer.bias[0])))
    torch.testing.assert_close(parts.predict_ious(2, hidden), wanted)
    assert parts.predict_ious(2, hidden[:0]).shape == (0,)


def test_autocast_changes_nothing():
    view = make_recorded_scene().record
    parts, hidden = make_parts(), torch.randn(5, HIDDEN).bfloat16()
    views = [view.view(stage) for stage in GATES]
    wanted = [answers(parts, v) for v in views]
    ious = parts.predict_ious(0, hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = [answers(parts, v) for v in views]
        torch.testing.assert_close(parts.predict_ious(0, hidden), ious, rtol=0, atol=0)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert all(t.dtype == torch.float32 for by_name in got for t in by_name.values())


def test_untrained_parts_return_a_half():
    parts = LearnedParts(
        names=REGION_PARTS,
        num_stages=3,
        hidden_features=(HIDDEN,) * 3,
        crop_channels=CROP_CHANNELS,
    )
    view = make_recorded_scene().record.view(0)
    assert parts.continue_probability(view).eq(0.5).all()
    assert parts.readiness(view)[view.is_foreground].eq(0.5).all()
    assert parts.predict_ious(0, torch.randn(4, HIDDEN)).eq(0.5).all()


def test_state_dict_names_and_round_trip():
    parts = make_parts()
    scorer = [f"{layer}.{kind}" for layer in ("fc1", "fc2", "logit") for kind in ("weight", "bias")]
    names = {f"iou_head.{s}.{kind}" for s in range(3) for kind in ("weight", "bias")}
    names |= {f"gate.{s}.{name}" for s in range(2) for name in scorer}
    names |= {f"pruner.{g}.{name}" for g in range(3) for name in scorer}
    names |= {"pruner.0.crop_norm.weight", "pruner.0.crop_norm.bias"}
    assert set(parts.state_dict()) == names

    twin = make_parts(seed=2)
    twin.load_state_dict(parts.state_dict())
    view = make_recorded_scene().record.view(1)
    torch.testing.assert_close(answers(twin, view), answers(parts, view), rtol=0, atol=0)


@pytest.mark.parametrize("name", REGION_PARTS)
def test_parts_are_built_one_by_one(name):
    parts = make_parts(names={name})
    assert parts.names == (name,)
    assert {key.split(".")[0] for key in parts.state_dict()} == {name}


def test_a_cascade_of_one_stage_has_a_gate_before_it_alone():
    parts = make_parts(num_stages=1)
    assert (len(parts.iou_head), len(parts.gate), len(parts.pruner)) == (1, 0, 1)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"unknown parts.*'gates'.*iou_head.*tile_head"):
        LearnedParts(names=("gates",), num_stages=3, hidden_features=(4,) * 3)
    with pytest.raises(ValueError, match="a tile head needs the channels"):
        LearnedParts(names=("tile_head",), num_stages=3, hidden_features=(4,) * 3)
    with pytest.raises(ValueError, match="2 hidden features for 3 stages"):
        LearnedParts(names=("gate",), num_stages=3, hidden_features=(4, 4))

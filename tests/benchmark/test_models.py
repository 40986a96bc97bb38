"""Our models on random weights: what reaches their heads, and what they return."""

import pytest
import torch

from cascade_det.benchmark import comparison
from cascade_det.benchmark.models import open_models
from cascade_det.benchmark.setup import Setup
from cascade_det.errors import CheckpointError
from cascade_det.report.tables import part_order

OURS = ("ours", "ours-fast", "ours-fast-exits")


@pytest.fixture(scope="module")
def models(setup):
    opened, left_out = open_models(setup, OURS)
    assert not left_out
    return opened


def test_exactly_the_given_regions_reach_the_heads(models, heads_output):
    output = heads_output(models["ours"])
    assert output.arrived == 80
    assert output.entered == [80, 80, 80]
    assert all(map(len, output.detections))


@pytest.mark.parametrize("count", [40, 12])
def test_the_rpn_returns_the_requested_number_of_proposals(models, whole_output, count):
    for model in models.values():
        assert whole_output(model, count).arrived == 2 * count


def test_exactly_the_survivors_enter_each_stage(models, heads_output):
    """20, 9.5 and 3 of each of two images, rounded up; all of them if there are fewer."""
    assert heads_output(models["ours-fast-exits"]).entered == [40, 20, 6]
    assert heads_output(models["ours-fast-exits"], count=12).entered == [24, 20, 6]


def test_rules_of_replayed_exits_run_and_remove_nothing(setup):
    policy, text = setup.exits
    assert {rule.reason for rule in policy.rules} == {"background", "redundant", "budget"}
    detector = setup.build_ours()
    batch = setup.batches(2)[0]
    regions = setup.regions(batch, 40)
    inputs = detector.cascade_inputs(batch)
    inputs.proposals, inputs.objectness = regions.boxes, regions.objectness
    detector.set_exits(policy)
    _, stats = detector.cascade.detect(**vars(inputs))
    assert all(set(left) <= {"budget", "completed"} for left in [stats.left_before, *stats.left])
    assert "20, 9.5, 3" in text


def test_models_that_share_an_adapter_keep_their_own_exits(models, heads_output):
    fast, exits = models["ours-fast"], models["ours-fast-exits"]
    assert fast.adapter is exits.adapter
    assert heads_output(exits).entered == [40, 20, 6]
    assert heads_output(fast).entered == [80, 80, 80]


def test_parts_are_those_of_a_detector(setup, models):
    for name, model in models.items():
        parts = model.parts(model.adapter.inputs(setup.batches(1)[0]))
        numbers = [f"{part}{i}" for i in range(3) for part in ("gate", "stage")]
        stages = [part for part in numbers if part.startswith("stage") or "exits" in name]
        wanted = ["preprocess", "backbone", "rpn", *stages, "postprocess"]
        assert sorted(parts, key=part_order) == wanted
        assert all(time > 0 for time in parts.values())


def test_a_seed_gives_the_same_weights_images_and_regions(setup, make_options):
    again, other = Setup(make_options()), Setup(make_options(seed=1))
    for name, value in setup.weights.items():
        torch.testing.assert_close(again.weights[name], value, rtol=0, atol=0)
    batches = [each.batches(1)[0] for each in (setup, again, other)]
    ours, same, others = [batch[0]["image"] for batch in batches]
    assert torch.equal(ours, same)
    assert not torch.equal(ours, others)
    ours, same, others = [each.regions(batches[0], 5).boxes[0] for each in (setup, again, other)]
    assert torch.equal(ours, same)
    assert not torch.equal(ours, others)


def test_random_regions_are_boxes_inside_the_image_best_first(setup):
    regions = setup.regions(setup.batches(2)[0], 500)
    for boxes, logits in zip(regions.boxes, regions.objectness, strict=True):
        assert boxes.shape == (500, 4)
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= torch.tensor([96.0, 64.0]) + 1e-4).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert torch.equal(logits, logits.sort(descending=True).values)


def test_comparisons_have_every_model_and_their_agreement(setup, models):
    for compare in (comparison.compare_heads, comparison.compare_whole):
        results = compare(setup, models, 1, 40)
        assert list(results["contenders"]) == list(OURS)
        assert results["contenders"]["ours-fast-exits"]["entered"] == [20, 10, 3]
        assert len(results["contenders"]["ours"]["ms_per_image"]["samples"]) == 2
        assert results["agreement"]["with"] == "ours"
        assert list(results["agreement"]["contenders"]) == ["ours-fast"]
    parts = comparison.compare_parts(setup, models, 1, 40)
    assert {"backbone", "stage2"} <= parts["contenders"]["ours"].keys()


def test_before_a_timed_call_the_allocator_is_set_and_the_model_runs_once(
    setup, models, monkeypatch
):
    events = []
    monkeypatch.setattr(comparison, "keep_freed_memory", events.append)
    watched = {name: models[name] for name in ("ours", "ours-fast")}
    for name, model in watched.items():
        adapter = model.adapter
        heads = adapter.heads
        monkeypatch.setattr(
            adapter, "heads", lambda x, n=name, f=heads: (events.append(n), f(x))[1]
        )
    comparison.compare_heads(setup, watched, 1, 40)
    a_round = [False, "ours", "ours", True, "ours-fast", "ours-fast"]
    assert events == ["ours", "ours-fast", *a_round, *a_round]


def test_ratios_are_of_baselines_to_ours(setup, monkeypatch):
    times = {"ours": [10.0, 20.0], "ours-fast": [5.0, 5.0], "torchvision": [40.0, 20.0]}
    monkeypatch.setattr(comparison, "keep_freed_memory", lambda keep: True)
    monkeypatch.setattr(comparison, "alternate", lambda *_, **__: times)
    results = comparison.compare_training(setup, {}, 2)
    assert results["contenders"]["ours"]["ms_per_image"]["median"] == 7.5
    medians = {(r["what"], r["against"]): r["ratio"]["median"] for r in results["ratios"]}
    # 40 / 10 and 20 / 20; 40 / 5 and 20 / 5.
    assert medians == {("ours", "torchvision"): 2.5, ("ours-fast", "torchvision"): 6.0}


def test_incomplete_weights_are_an_error(make_options, setup, tmp_path):
    backbone = {k: v for k, v in setup.weights.items() if k.startswith("backbone")}
    path = tmp_path / "backbone.pth"
    torch.save({"model": backbone}, path)
    with pytest.raises(CheckpointError, match=r"backbone\.pth: lacks the RPN"):
        _ = Setup(make_options("MODEL.WEIGHTS", str(path))).weights


def test_torchvision_is_left_out_for_another_backbone(setup):
    opened, left_out = open_models(setup, ["torchvision"])
    assert not opened
    assert "ResNet-50" in left_out["torchvision"]

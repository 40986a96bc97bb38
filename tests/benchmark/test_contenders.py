"""Our contenders on weights that nobody trained: what reaches their heads, and what comes out."""

import pytest
import torch

from cascade_det.benchmark import comparison
from cascade_det.benchmark.agreement import compare_detections
from cascade_det.benchmark.contenders import open_contenders
from cascade_det.benchmark.options import Survivors
from cascade_det.benchmark.setup import Setup, find_device
from cascade_det.errors import CheckpointError, ConfigError

OURS = ("ours", "ours-fast", "ours-fast-exits")


@pytest.fixture(scope="module")
def contenders(setup):
    opened, left_out = open_contenders(setup, OURS)
    assert not left_out
    return opened


def given(setup, images=2, count=40):
    batch = setup.batches(images)[0]
    return batch, setup.regions(batch, count)


def test_exactly_the_given_regions_reach_the_heads(setup, contenders):
    contender = contenders["ours"]
    outcome = contender.outcome(contender.heads(contender.prepare(*given(setup))))
    assert outcome.arrived == 80
    assert outcome.entered == [80, 80, 80]
    assert all(map(len, outcome.detections)), "what comes out is not nothing"


@pytest.mark.parametrize("count", [40, 12])
def test_as_many_proposals_as_asked_for_come_out_of_the_rpn(setup, contenders, count):
    for contender in contenders.values():
        contender.limit_proposals(count)
        batch = setup.batches(2)[0]
        outcome = contender.outcome(contender.whole(contender.inputs(batch)))
        assert outcome.arrived == 2 * count


def test_survivors_reach_their_stages_and_no_others(setup, contenders):
    """20, 9.5 and 3 of each of two images, rounded up; of fewer proposals, all."""
    contender = contenders["ours-fast-exits"]
    outcome = contender.outcome(contender.heads(contender.prepare(*given(setup))))
    assert outcome.entered == [40, 20, 6]
    outcome = contender.outcome(contender.heads(contender.prepare(*given(setup, count=12))))
    assert outcome.entered == [24, 20, 6]


def test_rules_of_replayed_exits_are_computed_and_remove_nobody(setup):
    policy, text = setup.exits
    assert {rule.reason for rule in policy.rules} == {"background", "redundant", "budget"}
    detector = setup.build_ours()
    batch, regions = given(setup)
    inputs = detector.cascade_inputs(batch)
    inputs.proposals, inputs.objectness = regions.boxes, regions.objectness
    detector.set_exits(policy)
    _, stats = detector.cascade.detect(**vars(inputs))
    assert all(set(left) <= {"budget", "completed"} for left in [stats.left_before, *stats.left])
    assert "20, 9.5, 3" in text


def test_exits_of_one_contender_are_not_those_of_the_next(setup, contenders):
    fast, exits = contenders["ours-fast"], contenders["ours-fast-exits"]
    assert fast.model is exits.model
    prepared = fast.prepare(*given(setup))
    assert exits.outcome(exits.heads(prepared)).entered == [40, 20, 6]
    assert fast.outcome(fast.heads(prepared)).entered == [80, 80, 80]


def test_the_optimised_one_detects_the_same(setup, contenders):
    found = {}
    for name in ("ours", "ours-fast"):
        contender = contenders[name]
        contender.limit_proposals(40)
        inputs = contender.inputs(setup.batches(2)[0])
        found[name] = contender.outcome(contender.whole(inputs)).detections
    figures = compare_detections(found["ours-fast"], found["ours"])
    assert figures["in_common"] == figures["detections"] == figures["of_the_other"] > 20


def test_in_bfloat16_the_optimised_one_detects_nearly_the_same(contenders, bfloat16_setup):
    """Eight bits of a number are left: some hundredths of a score, a part of a pixel of 96."""
    opened, _ = open_contenders(bfloat16_setup, ("ours-fast",))
    found = []
    for contender in (opened["ours-fast"], contenders["ours"]):
        contender.limit_proposals(40)
        inputs = contender.inputs(bfloat16_setup.batches(2)[0])
        found.append(contender.outcome(contender.whole(inputs)).detections)
    figures = compare_detections(*found)
    assert figures["in_common"] > 0.9 * figures["of_the_other"] > 20
    assert figures["detections"] > 0.9 * figures["of_the_other"]
    assert 0 < figures["score_difference"] < 0.05
    assert 0 < figures["box_difference"] < 1.0


def test_parts_are_those_of_a_detector(setup, contenders):
    for contender in contenders.values():
        parts = contender.parts(contender.inputs(setup.batches(1)[0]))
        stages = [f"stage{number}" for number in range(3)]
        assert list(parts) == ["preprocess", "backbone", "rpn", *stages, "postprocess"]
        assert all(time > 0 for time in parts.values())


def test_a_seed_gives_the_same_weights_images_and_regions(setup, make_options):
    again = Setup(make_options())
    other = Setup(make_options(seed=1))
    for name, value in setup.weights.items():
        torch.testing.assert_close(again.weights[name], value, rtol=0, atol=0)
    ours, same, others = (each.batches(1)[0] for each in (setup, again, other))
    assert torch.equal(ours[0]["image"], same[0]["image"])
    assert not torch.equal(ours[0]["image"], others[0]["image"])
    boxes = [each.regions(ours, 5).boxes[0] for each in (setup, again, other)]
    assert torch.equal(boxes[0], boxes[1])
    assert not torch.equal(boxes[0], boxes[2])


def test_drawn_regions_are_boxes_in_the_image_best_first(setup):
    _, regions = given(setup, count=500)
    for boxes, logits in zip(regions.boxes, regions.objectness, strict=True):
        assert boxes.shape == (500, 4)
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= torch.tensor([96.0, 64.0]) + 1e-4).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert torch.equal(logits, logits.sort(descending=True).values)


def test_comparisons_have_every_contender_and_their_agreement(setup, contenders):
    for compare in (comparison.compare_heads, comparison.compare_whole):
        figures = compare(setup, contenders, 1, 40)
        assert list(figures["contenders"]) == list(OURS)
        assert figures["contenders"]["ours-fast-exits"]["entered"] == [20, 10, 3]
        assert len(figures["contenders"]["ours"]["ms_per_image"]["samples"]) == 2
        assert figures["agreement"]["with"] == "ours"
        assert list(figures["agreement"]["contenders"]) == ["ours-fast"]
    parts = comparison.compare_parts(setup, contenders, 1, 40)
    assert {"backbone", "stage2"} <= parts["contenders"]["ours"].keys()


def test_memory_is_kept_for_optimised_ones_and_all_run_once_before(setup, contenders, monkeypatch):
    happened = []
    monkeypatch.setattr(comparison, "keep_freed_memory", happened.append)
    watched = {}
    for name in ("ours", "ours-fast"):
        contender = contenders[name]
        run = contender.heads
        monkeypatch.setattr(
            contender, "heads", lambda x, n=name, f=run: (happened.append(n), f(x))[1]
        )
        watched[name] = contender
    comparison.compare_heads(setup, watched, 1, 40)
    a_round = [False, "ours", "ours", True, "ours-fast", "ours-fast"]
    assert happened == ["ours", "ours-fast", *a_round, *a_round]


def test_ratios_are_of_peers_to_ours_by_hand(setup, contenders, monkeypatch):
    times = {"ours": [10.0, 20.0], "ours-fast": [5.0, 5.0], "torchvision": [40.0, 20.0]}
    monkeypatch.setattr(comparison, "keep_freed_memory", lambda keep: True)
    monkeypatch.setattr(comparison, "alternate", lambda *_, **__: times)
    figures = comparison.compare_training(setup, {}, 2)
    assert figures["contenders"]["ours"]["ms_per_image"]["median"] == 7.5
    medians = {(r["what"], r["against"]): r["ratio"]["median"] for r in figures["ratios"]}
    # 40 / 10 and 20 / 20; 40 / 5 and 20 / 5.
    assert medians == {("ours", "torchvision"): 2.5, ("ours-fast", "torchvision"): 6.0}


def test_survivors_of_another_number_of_stages_are_told(make_options):
    with pytest.raises(ConfigError, match="2 numbers, but"):
        Setup(make_options(survivors=Survivors((20.0, 10.0), "a test")))


def test_a_gpu_that_is_not_there_is_told():
    with pytest.raises(ConfigError, match="--device cuda:99"):
        find_device("cuda:99")


def test_weights_of_no_whole_detector_are_told(make_options, setup, tmp_path):
    backbone = {k: v for k, v in setup.weights.items() if k.startswith("backbone")}
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    path = str(tmp_path / "backbone.pth")
    options = make_options(opts=(*make_options().opts, "MODEL.WEIGHTS", path))
    with pytest.raises(CheckpointError, match=r"backbone\.pth: lacks the RPN"):
        _ = Setup(options).weights


def test_torchvision_is_no_contender_of_another_backbone(setup):
    opened, left_out = open_contenders(setup, ["torchvision"])
    assert not opened
    assert "ResNet-50" in left_out["torchvision"]

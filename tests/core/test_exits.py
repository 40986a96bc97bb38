"""The exit policy: order of the rules, its decisions, and what it needs."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_records import make_parts
from region_views import (
    as_accepted,
    as_seen,
    both_policies,
    make_view,
    on_gpu,
    policy,
    reasons_of,
    some_policies,
    view_of,
)

from cascade_det.benchmark.pretended_gpu import PretendedGPU
from cascade_det.core.exits import RegionView, build_exits
from cascade_det.core.exits.policy import CONFIDENCES

NEVER = 1.1


def decide(exits, view):
    return reasons_of(exits.decide(view), len(view))


def decide_on_a_gpu(exits, view):
    with PretendedGPU() as gpu:
        return decide(gpu.move(exits), on_gpu(view, gpu))


def test_reasons_by_hand():
    exits = policy(thresholds=(0.8, 0.5), prune_thresholds=(0.1, 0.3))
    probs = [
        [0.80, 0.05, 0.15],  # reaches the threshold of stage 0
        [0.10, 0.70, 0.20],
        [0.09, 0.08, 0.83],
        [0.10, 0.00, 0.90],  # just not below the prune threshold of stage 0
        [0.25, 0.25, 0.50],  # background is the top class, and never what counts
    ]
    assert decide(exits, view_of(probs)) == ["confident", None, "background", None, None]
    wanted = ["confident", "confident", "background", "background", "background"]
    assert decide(exits, view_of(probs, stage=1)) == wanted


def test_the_first_reason_that_applies_counts():
    every_reason = {
        "prune_thresholds": (0.3, 0.3),
        "redundancy_iou": 0.5,
        "thresholds": (0.5, 0.5),
        "region_budget": (0, 1, 1),
    }
    box = [0.0, 0.0, 10.0, 10.0]
    # Alike boxes: the first covers the others of its class, and is the best.
    view = view_of([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], boxes=[box] * 3)

    def without(*names):
        exits = policy(**{k: v for k, v in every_reason.items() if k not in names})
        return decide(exits, view)

    assert without() == ["confident", "redundant", "background"]
    assert without("prune_thresholds") == ["confident", "redundant", "redundant"]
    assert without("redundancy_iou") == ["confident", "confident", "background"]
    # The budget counts the regions that the other rules kept.
    assert without("redundancy_iou", "prune_thresholds") == ["confident", "confident", None]
    assert without("redundancy_iou", "thresholds") == [None, "budget", "background"]
    assert without("redundancy_iou", "prune_thresholds", "thresholds") == [None, "budget", "budget"]


def test_a_rule_sees_the_regions_that_the_rules_before_kept():
    # Of three that overlap in a row, the first covers the second; pruned, it covers nothing.
    boxes = [[0.0, 0, 10, 10], [0.0, 0, 10, 8], [0.0, 0, 10, 6]]
    probs = [[0.9, 0.0, 0.1], [0.3, 0.0, 0.7], [0.5, 0.0, 0.5]]
    view = view_of(probs, boxes=boxes)
    assert decide(policy(redundancy_iou=0.7), view) == [None, "redundant", None]
    # The third covers the second, were it not pruned.
    view = view_of([[0.5, 0.0, 0.5], [0.9, 0.0, 0.1], [0.2, 0.0, 0.8]], boxes=boxes)
    both = {"redundancy_iou": 0.7, "prune_thresholds": (0.3, 0.3)}
    assert decide(policy(redundancy_iou=0.7), view) == ["redundant", None, "redundant"]
    assert decide(policy(**both), view) == ["redundant", None, "background"]


def test_both_kinds_of_background_are_one_reason():
    exits = policy(prune_thresholds=(0.1, 0.1), prune_margins=(1, 0.2, 0.2), prune_best=1)
    view = view_of([[0.05, 0.95], [0.5, 0.5], [0.9, 0.1], [0.75, 0.25]])
    assert decide(exits, view) == ["background", "background", None, None]


@pytest.mark.parametrize("stage", [-1, 0, 1])
def test_without_rules_all_regions_stay(stage):
    neutral = {
        "thresholds": (NEVER, NEVER),
        "prune_thresholds": (0.0, 0.0),
        "prune_margins": (1, 1, 1),
        "pruner_thresholds": (0.0,) * 3,
        "region_budget": (0, 0, 0),
    }
    for exits in (policy(), policy(**neutral), policy(**neutral, confidence="margin")):
        assert exits.rules == ()
        assert not exits.needs_crops
        assert not exits.needs_objectness
        assert not exits.needs_accepted
        decision = exits.decide(make_view(stage=stage))
        assert decision.kept is None
        assert decision.exited == {}


def test_gates_that_are_off():
    rules = {"prune_thresholds": (0.3, 0.3), "redundancy_iou": 0.5, "region_budget": (9, 5, 2)}
    views = {stage: make_view(stage=stage) for stage in (-1, 0, 1)}
    for off in ((), (0,), (1,), (0, 2), (0, 1, 2)):
        exits = policy(**rules, gates_off=off)
        for stage, view in views.items():
            wanted = policy(**rules).decide(view).exited
            assert wanted
            decision = exits.decide(view)
            assert decision.exited.keys() == (set() if stage + 1 in off else wanted.keys())
            assert exits.has_gate(stage) == (stage + 1 not in off)
    assert policy(**rules, gates_off=(0,)).needs_objectness is False
    with pytest.raises(ValueError, match=r"no gates \[3\]: 3 stages have 0 to 2"):
        policy(**rules, gates_off=(0, 3))


def test_the_time_is_limited_at_gates_that_are_off_too():
    exits = policy(region_budget=(0, 5, 0), gates_off=(1,), time_budget_ms=1.0, clock=lambda: 2.0)
    deadline = exits.time_budget.start(1, 0.0)
    view = make_view(stage=0)
    assert reasons_of(exits.decide(view, deadline), len(view)) == ["budget"] * len(view)
    assert exits.decide(view).exited == {}


@given(
    arguments=some_policies(),
    localisation=st.sampled_from(["none", "refinement", "predicted_iou"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_any_policy_decides_as_the_naive_one(arguments, localisation, seed):
    exits, naive = both_policies(
        **arguments,
        localisation=localisation,
        localisation_thresholds=(0.4, 0.7),
        learned=make_parts(names=("iou_head",)),
    )
    for stage in (-1, 0, 1):
        view = make_view(stage=stage, seed=seed + stage, num_accepted=3 if stage == 1 else 0)
        wanted = naive.decide(stage, as_seen(view), as_accepted(view))
        assert naive.closest > 1e-6
        assert decide(exits, view) == decide(exits, view_of_known_sizes(view)) == wanted
        # In other operations, as a GPU waits for every number of regions.
        assert decide_on_a_gpu(copy.deepcopy(exits), view) == wanted


def test_a_gate_waits_once_for_a_gpu():
    rules = {"prune_thresholds": (0.4, 0.4), "redundancy_iou": 0.5, "thresholds": (0.7, 0.7)}
    exits = policy(**rules, region_budget=(3, 3, 3))
    view = make_view(stage=1, counts=(40, 30), num_accepted=4)
    wanted = decide(exits, view)
    assert {"background", "redundant", "confident", "budget", None} == set(wanted)
    with PretendedGPU() as gpu:
        moved = on_gpu(view, gpu)
        gpu.reset()
        decision = exits.decide(moved)
        assert gpu.waits.total() == 1, gpu.places
        assert reasons_of(decision, len(view)) == wanted


def view_of_known_sizes(view):
    return dataclasses.replace(view, sizes=tuple(view.counts.tolist()))


@pytest.mark.parametrize("stage", [-1, 0, 1])
def test_a_gate_without_regions(stage):
    everything = policy(
        thresholds=(0.5, 0.5),
        localisation="refinement",
        localisation_thresholds=(0.5, 0.5),
        prune_thresholds=(0.1, 0.1),
        proposal_threshold=0.1,
        prune_margins=(0.1,) * 3,
        redundancy_iou=0.8,
        region_budget=(5, 5, 5),
        time_budget_ms=1.0,
        pruner_thresholds=(0.5,) * 3,
        confidence="learned",
        learned=make_parts(),
    )
    view = make_view(stage=stage, counts=(0, 0))
    decision = everything.decide(view)
    assert decision.kept is None
    assert decision.exited == {}


def test_what_a_policy_needs():
    parts = make_parts()

    def needs(**arguments):
        exits = policy(**arguments, learned=parts)
        return exits.needs_objectness, exits.needs_crops, exits.needs_accepted

    accept = {"thresholds": (0.9, 0.9)}
    assert needs(**accept) == (False, False, False)
    assert needs(**accept, prune_thresholds=(0.1, 0.1), redundancy_iou=0.8) == (False, False, True)
    assert needs(redundancy_iou=0.8) == (False, False, False)
    assert needs(redundancy_iou=0.8, thresholds=(NEVER, NEVER)) == (False, False, False)
    assert needs(proposal_threshold=0.1) == (True, False, False)
    assert needs(prune_margins=(0.5, 1, 1)) == (True, False, False)
    assert needs(prune_margins=(1, 0.5, 1)) == (False, False, False)
    assert needs(region_budget=(5, 0, 0)) == (True, False, False)
    assert needs(region_budget=(0, 5, 5)) == (False, False, False)
    assert needs(time_budget_ms=5.0) == (False, False, False)
    assert needs(pruner_thresholds=(0.5, 0, 0)) == (True, True, False)
    # The objectness is among what they see at every gate.
    assert needs(pruner_thresholds=(0, 0.5, 0)) == (True, False, False)
    assert needs(confidence="learned", **accept) == (True, False, False)
    assert needs(confidence="learned", thresholds=(NEVER, NEVER)) == (False, False, False)
    # Two stages or more in a row is no probability above 1.
    assert needs(confidence="agreement", thresholds=(2, 2), redundancy_iou=0.8)[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"thresholds": (0.5, 0.5, 0.5)}, "3 thresholds for 3 stages: give 2"),
        ({"localisation_thresholds": (0.5,)}, "1 localisation thresholds for 3 stages: give 2"),
        ({"prune_thresholds": (0.5,)}, "1 prune thresholds for 3 stages: give 2"),
        ({"prune_margins": (0.5, 0.5)}, "2 prune margins for 3 stages: give 3"),
        ({"pruner_thresholds": (0.5, 0.5)}, "2 pruner thresholds for 3 stages: give 3"),
        ({"region_budget": (5, 5)}, "2 region budgets for 3 stages: give 3"),
        ({"score_scales": (1.0, 1.0)}, "2 score scales for 3 stages: give 3"),
        ({"score_shifts": (1.0, 1.0)}, "2 score shifts for 3 stages: give 3"),
        ({"pruner_thresholds": (0, 0.5, 0)}, "learned part 'pruner'"),
        ({"thresholds": (0.5, 0.5), "confidence": "learned"}, "learned part 'gate'"),
        ({"thresholds": (0.5, 0.5), "localisation": "predicted_iou"}, "learned part 'iou_head'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        policy(**arguments)


def test_every_confidence_has_a_rule():
    for confidence in CONFIDENCES:
        exits = policy(confidence=confidence, thresholds=(0.5, 0.5), learned=make_parts())
        decide(exits, make_view())


def test_building_with_parts():
    assert build_exits(None, [8, 8, 8], 4) is None
    exits = build_exits({"num_stages": 3, "learned": ()}, [8, 8, 8], 4)
    assert exits.learned is None
    assert list(exits.state_dict()) == []
    parts = {"num_stages": 3, "learned": ("iou_head", "pruner"), "pruner_thresholds": (0.5,) * 3}
    exits = build_exits(parts, [8, 9, 10], 4)
    assert exits.learned.names == ("iou_head", "pruner")
    assert [layer.in_features for layer in exits.learned.iou_head] == [8, 9, 10]
    assert exits.learned.crop_channels == 4
    assert {name.split(".")[1] for name in exits.state_dict()} == {"iou_head", "pruner"}


class TestCalibration:
    def test_by_hand(self):
        exits = policy(score_scales=(2.0, 1.0, 1.0), score_shifts=(0.0, 0.0, 1.0))
        probs = torch.tensor([[0.75, 0.05, 0.2]])
        # Odds are squared: 9 : 1, and 1 : 361.
        wanted = torch.tensor([[0.9, 1 / 362, 0.2]])
        torch.testing.assert_close(exits.calibrated(probs, 0), wanted)
        assert torch.equal(exits.calibrated(probs, 1), probs)
        # Odds times e.
        odds = [3 * torch.e, torch.e / 19]
        wanted = torch.tensor([[*(o / (1 + o) for o in odds), 0.2]])
        torch.testing.assert_close(exits.calibrated(probs, 2), wanted)

    def test_of_certain_scores_is_finite_and_keeps_their_order(self):
        exits = policy(score_scales=(3.0, 3.0, 3.0), score_shifts=(-2.0,) * 3)
        scores = torch.tensor([0.0, 1e-7, 1e-3, 0.5, 0.999, 1.0])
        got = exits.calibrated(torch.stack((scores, 1 - scores), dim=1), 0)
        assert got.isfinite().all()
        assert (got[1:, 0] >= got[:-1, 0]).all()
        assert torch.equal(got[:, 1], 1 - scores)

    def test_is_off_by_default(self):
        probs = torch.rand(3, 4)
        assert policy().calibrated(probs, 1) is probs
        assert (
            policy(score_scales=(1.0,) * 3, score_shifts=(0.0,) * 3).calibrated(probs, 1) is probs
        )


class TestView:
    def test_indexing_selects_rows_of_every_field(self):
        view = dataclasses.replace(make_view(stage=1, num_accepted=2))  # nothing cached yet
        rows = torch.tensor([1, 3, 4, 15])
        for looked_at in (False, True):
            part = view[rows]
            for field in dataclasses.fields(RegionView):
                whole, own = getattr(view, field.name), getattr(part, field.name)
                if field.name in ("stage", "num_images", "accepted"):
                    assert own is whole
                elif whole is None:
                    assert own is None
                else:
                    assert torch.equal(own, whole[rows])
            assert torch.equal(part.scores, view.probs[rows, :-1].amax(dim=1))
            assert torch.equal(part.classes, view.probs[rows, :-1].argmax(dim=1))
            assert looked_at == ({"scores", "classes"} <= vars(view[rows]).keys())
            assert len(view.scores) == len(view.classes) == len(view)

    def test_ranks_and_counts(self):
        view = make_view(counts=(3, 0, 4), stage=-1)
        view.objectness = torch.tensor([0.1, 0.3, 0.2, 0.5, 0.7, 0.5, 0.6])
        assert view.ranks.tolist() == [2, 0, 1, 2, 0, 3, 1]
        assert view.counts.tolist() == [3, 0, 4]
        torch.testing.assert_close(view.scores, torch.sigmoid(view.objectness))

    def test_ranks_of_live_regions(self):
        # Scores of 0 are better than any of a region that is gone.
        view = view_of([[0.0, 1.0], [0.9, 0.1], [0.0, 1.0], [0.4, 0.6]])
        live = view.without(torch.tensor([True, False, False, True]))
        assert live.ranks.tolist()[1:3] == [0, 1]
        assert live.counts.tolist() == [2]

    def test_refinement(self):
        view = make_view(stage=0, counts=(1,))
        view.boxes_before = torch.tensor([[0.0, 0, 10, 10]])
        view.boxes = torch.tensor([[5.0, 0, 15, 10]])
        torch.testing.assert_close(view.refinement_ious, torch.tensor([1 / 3]))

"""The walk of regions through the stages with every rule: the naive cascade, and the laws."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from naive_exits import NaivePolicy
from region_views import both_policies, policy, some_policies
from small_cascades import (
    CHANNELS,
    NUM_CLASSES,
    as_detections,
    assert_same_detections,
    make_cascade,
    make_scene,
    naive_twin,
    record_calls,
    truncate,
)

from cascade_det.core import EXIT_REASONS
from cascade_det.core.ensemble import ENSEMBLES
from cascade_det.core.exits import Accepted, RegionView
from cascade_det.core.exits.learned import LEARNED_PARTS, LearnedParts

FEW = settings(deadline=None, max_examples=4, derandomize=True)
SOME = settings(deadline=None, max_examples=12, derandomize=True)
EVERY_RULE = {
    "proposal_threshold": 0.3,
    "prune_thresholds": (0.35, 0.3),
    "prune_margins": (0.4, 0.35, 0.4),
    "prune_best": 4,
    "redundancy_iou": 0.5,
    "thresholds": (0.65, 0.6),
    "localisation": "refinement",
    "localisation_thresholds": (0.2, 0.2),
    "region_budget": (18, 7, 3),
    "score_scales": (0.8, 0.9, 1.0),
    "score_shifts": (-0.2, 0.1, 0.3),
}


def objectness_of(scene, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(p), generator=generator) for p in scene.proposals]


def detect(cascade, scene, objectness=None):
    if objectness is None:
        objectness = objectness_of(scene)
    return cascade.detect(scene.features, scene.proposals, scene.image_sizes, objectness=objectness)


def assert_clear(is_clear):
    assert is_clear


def assert_as_naive(cascade, scene, naive_policy, *, expect=assert_clear):
    """Detections, statistics, and which regions were pooled; return the statistics.

    ``expect`` is told whether no value comes so near to its threshold that rounding decides.
    """
    objectness = objectness_of(scene)
    naive = naive_twin(cascade, naive_policy).detect(
        scene.features, scene.proposals, scene.image_sizes, objectness
    )
    expect(naive_policy.closest > 1e-5)
    pooled, rows = record_calls(cascade)
    detections, stats = detect(cascade, scene, objectness)
    assert_same_detections(detections, as_detections(naive.detections))
    assert stats.proposed == sum(len(p) for p in scene.proposals)
    assert stats.left_before == naive.left_before
    assert stats.entered == [len(survivors) for survivors in naive.survivors]
    assert stats.left == naive.left
    if stats.entered[0] == 0:
        assert stats.confidence == []
        naive.confidence.clear()
    for got, wanted in zip(stats.confidence, naive.confidence, strict=True):
        assert got == pytest.approx(wanted, rel=1e-4)
    wanted = [[image for image, _ in survivors] for survivors in naive.survivors if survivors]
    assert [image_index.tolist() for _, image_index in pooled] == wanted
    if cascade.ensemble.name != "last_boxes":
        assert rows == [[n, n] if n else [] for n in stats.entered]
    return stats


def assert_adds_up(stats):
    """Everybody is somewhere."""
    assert stats.proposed - sum(stats.left_before.values()) == stats.entered[0]
    for stage, then in enumerate([*stats.entered[1:], 0]):
        assert sum(stats.left[stage].values()) == stats.entered[stage] - then
    for left in (stats.left_before, *stats.left):
        assert all(count > 0 for count in left.values())
        assert set(left) <= set(EXIT_REASONS)


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("cls_agnostic", [True, False])
class TestAgainstNaiveCascade:
    def test_every_rule(self, ensemble, cls_agnostic):
        exits, naive = both_policies(**EVERY_RULE)
        cascade = make_cascade(ensemble=ensemble, cls_agnostic=cls_agnostic, exits=exits)
        stats = assert_as_naive(cascade, make_scene(num_proposals=(60, 50)), naive)
        assert_adds_up(stats)
        assert set(stats.left_before) == {"background", "budget"}
        assert set(stats.left[0]) | set(stats.left[1]) == set(EXIT_REASONS) - {"completed"}
        assert stats.left[2]["completed"] > 0

    @given(arguments=some_policies(), seed=st.integers(0, 100))
    @FEW
    def test_some_rules(self, ensemble, cls_agnostic, arguments, seed):
        exits, naive = both_policies(**arguments)
        cascade = make_cascade(
            ensemble=ensemble, cls_agnostic=cls_agnostic, exits=exits, score_thresh=0.1
        )
        assert_adds_up(assert_as_naive(cascade, make_scene(seed=seed), naive, expect=assume))


def make_learned(names=LEARNED_PARTS, num_stages=3):
    """Parts whose answers differ."""
    torch.manual_seed(5)
    parts = LearnedParts(
        names=names,
        num_stages=num_stages,
        hidden_features=[12] * num_stages,
        crop_channels=CHANNELS,
    )
    for parameter in parts.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return parts


def naive_answers(answer):
    """Answers of a learned part for regions of the naive cascade."""

    def answers(stage, regions):
        def column(name, dtype=torch.float32):
            return torch.tensor([getattr(region, name) for region in regions], dtype=dtype)

        view = RegionView(
            stage=stage,
            num_images=2,
            image_index=column("image", torch.int64),
            boxes=column("box"),
            objectness=column("objectness"),
        )
        if stage < 0:
            view.crops = torch.stack([region.crop.float() for region in regions])
        else:
            view.boxes_before, view.probs = column("before"), column("probs")
            view.agreements = column("agreements", torch.int64)
            if regions[0].predicted_iou is not None:
                view.predicted_ious = column("predicted_iou")
        with torch.no_grad():
            return answer(view).tolist()

    return answers


def between(answers):
    """A threshold that some of the answers reach, those of 0 aside."""
    return answers[answers > 0].mean().item()


@pytest.mark.parametrize(
    ("names", "arguments"),
    [
        (("iou_head",), {"localisation": "predicted_iou", "thresholds": (0.5, 0.5)}),
        (("gate",), {"confidence": "learned"}),
        (("iou_head", "gate"), {"confidence": "learned"}),
        (("pruner",), {}),
        (("iou_head", "pruner"), {}),
        (LEARNED_PARTS, {"confidence": "learned"}),
    ],
)
def test_learned_parts_in_the_naive_cascade(names, arguments):
    parts, scene = make_learned(names), make_scene()
    cascade = make_cascade(exits=policy(learned=parts))
    record = cascade.record(
        scene.features, scene.proposals, scene.image_sizes, objectness=objectness_of(scene)
    )
    views = [record.view(stage) for stage in (-1, 0, 1)]
    if "iou_head" in names:
        levels = tuple(between(view.predicted_ious) for view in views[1:])
        arguments = arguments | {"localisation_thresholds": levels}
    if "gate" in names:
        levels = tuple(between(parts.readiness(view)) for view in views[1:])
        arguments = arguments | {"thresholds": levels}
    if "pruner" in names:
        levels = tuple(between(parts.continue_probability(view)) for view in views)
        arguments = arguments | {"pruner_thresholds": levels}
    exits, naive = both_policies(**arguments, learned=parts)
    naive.gate, naive.pruner = map(naive_answers, (parts.readiness, parts.continue_probability))
    cascade.exits = exits
    stats = assert_as_naive(cascade, scene, naive)
    assert_adds_up(stats)
    reason = "background" if "pruner" in names else "confident"
    assert 0 < stats.left[0][reason] < stats.entered[0]
    assert 0 < stats.left[1][reason] < stats.entered[1]
    assert (stats.entered[0] < stats.proposed) == ("pruner" in names)


def test_stages_agree_in_four_stages():
    for patience, stage in ((1, 1), (2, 2)):
        exits, naive = both_policies(num_stages=4, confidence="agreement", thresholds=patience)
        stats = assert_as_naive(make_cascade(num_stages=4, exits=exits), make_scene(), naive)
        assert stats.entered[stage] == 41
        assert stats.left[stage]["confident"] > 0


def test_what_a_policy_sees():
    """Every field of the views, in a run where nobody leaves."""
    exits = policy(learned=make_learned(), pruner_thresholds=(1e-9, 0, 0))
    cascade, scene = make_cascade(exits=exits), make_scene()
    views, decide = [], exits.decide
    exits.decide = lambda view, _: views.append(view) or decide(view)
    pooled, _ = record_calls(cascade)
    objectness = objectness_of(scene)
    detect(cascade, scene, objectness)
    stages = cascade.detect_stages(scene.features, scene.proposals, scene.image_sizes)
    assert [view.stage for view in views] == [-1, 0, 1]
    assert torch.equal(views[0].boxes, torch.cat(scene.proposals))
    assert views[0].probs is None
    assert views[0].boxes_before is None
    assert views[0].crops.shape == (41, CHANNELS)
    seen = []
    for view in views:
        assert view.num_images == 2
        assert view.image_index.tolist() == [0] * 24 + [1] * 17
        assert torch.equal(view.objectness, torch.cat(objectness))
        assert view.accepted is None
    for view in views[1:]:
        assert torch.equal(view.boxes_before, torch.cat(stages[view.stage].boxes_before))
        assert torch.equal(view.boxes, torch.cat(stages[view.stage].boxes_after))
        assert torch.equal(view.boxes_before, pooled[view.stage][0])
        assert view.probs.shape == (41, NUM_CLASSES + 1)
        seen.append(view.probs.argmax(dim=1))
        agrees = (seen[0] == seen[-1]) if view.stage else torch.zeros(41)
        assert view.agreements.tolist() == agrees.long().tolist()
        assert ((view.predicted_ious > 0) & (view.predicted_ious < 1)).all()


def test_accepted_regions_are_seen_where_redundancy_asks():
    views = []

    def run(**arguments):
        views.clear()
        exits = policy(num_stages=4, thresholds=(0.7, 0.5, 0.4), **arguments)
        decide = exits.decide
        exits.decide = lambda view, _: views.append(view) or decide(view)
        detect(make_cascade(num_stages=4, exits=exits), make_scene())
        return [view.accepted for view in views]

    *none, after_one, after_two = run(redundancy_iou=1.0)
    assert none == [None, None]
    for accepted, stages in ((after_one, 1), (after_two, 2)):
        confident = [
            view[torch.nonzero(view.scores >= threshold).squeeze(1)]
            for view, threshold in zip(views[1 : 1 + stages], (0.7, 0.5), strict=False)
        ]
        wanted = Accepted.from_views(confident)
        assert all(map(len, confident))
        for name in ("boxes", "scores", "classes", "image_index"):
            assert torch.equal(getattr(accepted, name), getattr(wanted, name))
    assert run() == [None] * 4
    assert Accepted.from_views([]) is None


class TestLaws:
    @given(arguments=some_policies(), seed=st.integers(0, 100), agnostic=st.booleans())
    @SOME
    def test_a_batch_is_its_images_one_by_one(self, arguments, seed, agnostic):
        sizes = [(240, 320), (200, 280), (240, 240)]
        cascade = make_cascade(cls_agnostic=agnostic, exits=policy(**arguments), score_thresh=0.1)
        scene = make_scene(
            seed=seed, num_proposals=(20, 0, 25), num_objects=(4, 2, 4), image_sizes=sizes
        )
        objectness = objectness_of(scene)
        together, stats = detect(cascade, scene, objectness)
        entered, left = torch.zeros(3, dtype=torch.int64), [{}, {}, {}]
        for i in range(3):
            [alone], own = cascade.detect(
                [level[i : i + 1] for level in scene.features],
                scene.proposals[i : i + 1],
                [sizes[i]],
                objectness=objectness[i : i + 1],
            )
            assert_same_detections([together[i]], [alone])
            entered += torch.tensor(own.entered)
            for total, counts in zip(left, own.left, strict=True):
                for reason, count in counts.items():
                    total[reason] = total.get(reason, 0) + count
        assert stats.entered == entered.tolist()
        # An image that lost all its regions completes with 0 of them.
        assert stats.left == [{r: n for r, n in counts.items() if n} for counts in left]

    @given(arguments=some_policies(), seed=st.integers(0, 100))
    @SOME
    def test_permuted_proposals_permute_nothing_but_the_order(self, arguments, seed):
        cascade = make_cascade(exits=policy(**arguments), score_thresh=0.1)
        scene, permuted = make_scene(seed=seed), make_scene(seed=seed)
        objectness = objectness_of(scene)
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(len(p), generator=generator) for p in scene.proposals]
        pairs = list(zip(scene.proposals, objectness, orders, strict=True))
        permuted.proposals = [p[order] for p, _, order in pairs]
        wanted, stats = detect(cascade, scene, objectness)
        got, permuted_stats = detect(cascade, permuted, [o[order] for _, o, order in pairs])
        assert permuted_stats == stats
        assert_same_detections(got, wanted)

    @pytest.mark.parametrize("ensemble", ENSEMBLES)
    @pytest.mark.parametrize("confidence", ["max_prob", "entropy", "margin", "agreement"])
    def test_leaving_after_the_first_stage_is_a_one_stage_head(self, ensemble, confidence):
        cascade, scene = make_cascade(ensemble=ensemble), make_scene()
        wanted, _ = detect(truncate(cascade, 1), scene)
        cascade.exits = policy(
            thresholds=(0.0, 0.0),
            confidence=confidence,
            localisation="refinement",
            localisation_thresholds=(0.0, 0.0),
        )
        pooled, _ = record_calls(cascade)
        detections, stats = detect(cascade, scene)
        assert_same_detections(detections, wanted, exact=True)
        assert stats.left == [{"confident": 41}, {}, {}]
        assert len(pooled) == 1

    @given(
        confidence=st.sampled_from(["max_prob", "entropy", "margin", "agreement"]),
        thresholds=st.tuples(*[st.tuples(st.floats(0, 1.1), st.floats(0, 1.1)).map(sorted)] * 2),
        localise=st.booleans(),
    )
    @SOME
    def test_a_higher_threshold_never_removes_work(self, confidence, thresholds, localise):
        low, high = zip(*thresholds, strict=True)
        always = (0.0, 0.0)
        works = []
        for values in (low, high):
            exits = policy(
                confidence=confidence,
                thresholds=always if localise else values,
                localisation="refinement",
                localisation_thresholds=values if localise else always,
            )
            works.append(detect(make_cascade(exits=exits), make_scene())[1].entered)
        assert all(less <= more for less, more in zip(*works, strict=True))

    @given(budgets=st.tuples(*[st.tuples(st.integers(1, 30), st.integers(1, 30)).map(sorted)] * 3))
    @FEW
    def test_a_higher_budget_never_removes_work(self, budgets):
        low, high = zip(*budgets, strict=True)
        works = [
            detect(make_cascade(exits=policy(region_budget=most)), make_scene())[1].entered
            for most in (low, high)
        ]
        assert all(less <= more for less, more in zip(*works, strict=True))
        for most, work in zip((low, high), works, strict=True):
            assert all(count <= 2 * limit for count, limit in zip(work, most, strict=True))

    @pytest.mark.parametrize("ensemble", ENSEMBLES)
    @pytest.mark.parametrize("counts", [(0, 0), (9, 0), (0, 9)])
    def test_empty_proposals(self, ensemble, counts):
        exits = policy(
            **{**EVERY_RULE, "pruner_thresholds": (0.3, 0.3, 0.3), "confidence": "learned"},
            learned=make_learned(),
        )
        cascade = make_cascade(exits=exits, ensemble=ensemble)
        detections, stats = detect(cascade, make_scene(num_proposals=counts))
        assert_adds_up(stats)
        for found, count in zip(detections, counts, strict=True):
            assert found.boxes.shape == (len(found), 4)
            assert found.exit_stages.dtype == found.classes.dtype == torch.int64
            assert count or not len(found)

    def test_an_image_leaves_when_all_its_regions_left(self):
        cascade, scene = make_cascade(), make_scene()
        # Of image 1 nobody passes the objectness; of image 0 all.
        objectness = [torch.full((24,), 3.0), torch.full((17,), -3.0)]
        cascade.exits = policy(proposal_threshold=0.5)
        pooled, rows = record_calls(cascade)
        detections, stats = detect(cascade, scene, objectness)
        assert stats.left_before == {"background": 17}
        assert [image_index.unique().tolist() for _, image_index in pooled] == [[0]] * 3
        assert rows == [[24, 24]] * 3
        assert [len(d) > 0 for d in detections] == [True, False]
        cascade.exits = None
        [wanted], _ = cascade.detect(
            [level[:1] for level in scene.features], scene.proposals[:1], scene.image_sizes[:1]
        )
        assert_same_detections(detections[:1], [wanted])

    def test_when_nobody_enters_no_stage_runs(self):
        cascade = make_cascade(exits=policy(proposal_threshold=0.999))
        pooled, _ = record_calls(cascade)
        detections, stats = detect(cascade, make_scene())
        assert pooled == []
        assert stats.entered == [0, 0, 0]
        assert stats.left == [{}, {}, {}]
        assert [len(d) for d in detections] == [0, 0]

    def test_rules_that_let_nobody_go_change_no_bit(self):
        cascade, scene = make_cascade(), make_scene()
        wanted, stats = detect(cascade, scene)
        cascade.exits = policy(
            proposal_threshold=1e-9,
            prune_thresholds=(1e-9, 1e-9),
            prune_margins=(0.9999,) * 3,
            redundancy_iou=1.0,
            region_budget=(41,) * 3,
            time_budget_ms=1e9,
            score_scales=(1.0,) * 3,
            score_shifts=(0.0,) * 3,
        )
        detections, stats_with_exits = detect(cascade, scene)
        assert_same_detections(detections, wanted, exact=True)
        assert stats_with_exits == stats

    def test_nan_in_one_image_does_not_reach_the_other(self):
        cascade = make_cascade(exits=policy(**EVERY_RULE))
        scene = make_scene(num_proposals=(60, 50))
        wanted, _ = detect(cascade, scene)
        for level in scene.features:
            level[0] = torch.nan
        detections, stats = detect(cascade, scene)
        assert_adds_up(stats)
        assert len(detections[0]) == 0
        assert len(wanted[1]) > 3
        assert_same_detections(detections[1:], wanted[1:])


def test_scores_are_calibrated_by_the_stage_of_the_exit():
    thresholds = {"thresholds": (0.7, 0.6)}
    cascade, scene = make_cascade(exits=policy(**thresholds), score_thresh=0.0), make_scene()
    cascade.nms_thresh, cascade.detections_per_image = 1.0, -1
    wanted, stats = detect(cascade, scene)
    shifts = (-1.0, 0.5, 2.0)
    cascade.exits = policy(**thresholds, score_scales=(1.0,) * 3, score_shifts=shifts)
    got, shifted = detect(cascade, scene)
    assert shifted == stats
    assert shifted.confidence == stats.confidence
    for ours, plain in zip(got, wanted, strict=True):
        expected = torch.sigmoid(
            torch.logit(plain.scores, eps=1e-6) + torch.tensor(shifts)[plain.exit_stages]
        )
        torch.testing.assert_close(ours.scores, expected.sort(descending=True).values)


def test_proposals_without_objectness_are_told_where_it_is_asked_for():
    cascade, scene = make_cascade(exits=policy(proposal_threshold=0.1)), make_scene()
    with pytest.raises(ValueError, match="objectness"):
        cascade.detect(scene.features, scene.proposals, scene.image_sizes)
    cascade.exits = policy(
        **{**EVERY_RULE, "proposal_threshold": 0.0, "prune_margins": ()}
        | {"region_budget": (0, 7, 3)}
    )
    cascade.detect(scene.features, scene.proposals, scene.image_sizes)


def test_learned_parts_of_exits_have_their_names_in_the_state_dict():
    parts = make_learned()
    cascade = make_cascade(exits=policy(learned=parts))
    names = [name for name in cascade.state_dict() if name.startswith("exits.")]
    assert names == [f"exits.learned.{name}" for name in parts.state_dict()]
    assert len(names) > 20


def test_gradients_do_not_go_through_who_leaves():
    exits = policy(thresholds=(0.1, 0.1), confidence="learned", learned=make_learned())
    cascade, scene = make_cascade(exits=exits), make_scene()
    detections, stats = detect(cascade, scene)
    assert 0 < stats.left[0]["confident"] < 41
    sum(found.scores.sum() for found in detections).backward()
    assert all(p.grad is None for p in exits.parameters())


def test_naive_policy_is_the_neutral_one_by_default():
    _, stats = detect(make_cascade(exits=policy()), make_scene())
    assert assert_as_naive(make_cascade(exits=policy()), make_scene(), NaivePolicy()) == stats

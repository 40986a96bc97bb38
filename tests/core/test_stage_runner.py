"""A cascade with every exit rule: against the naive cascade, and the laws of exits."""

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_records import make_parts
from region_views import both_policies, policy, some_policies
from small_cascades import (
    CHANNELS,
    POOLED,
    STRIDES,
    as_detections,
    assert_same_detections,
    detect,
    detect_stages,
    make_cascade,
    make_scene,
    naive_twin,
    objectness_of,
    record_calls,
    truncate,
)

from cascade_det.core import RoIPooler
from cascade_det.core.ensemble import ENSEMBLES
from cascade_det.core.exits import RegionView
from cascade_det.core.exits.learned import REGION_PARTS
from cascade_det.core.structures import EXIT_REASONS

FEW = settings(max_examples=4)
SOME = settings(max_examples=12)
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
CONFIDENCES = ["max_prob", "entropy", "margin", "agreement"]
PAIR = st.tuples(st.floats(0, 1.1), st.floats(0, 1.1)).map(sorted)


def assert_clear(is_clear):
    assert is_clear


def are_distinct(naive_images):
    """Whether rounding does not decide the order of the detections."""
    scores = [sorted(d.score for d in found) for found in naive_images]
    return all(b - a > 1e-6 for own in scores for a, b in pairwise(own))


def assert_as_naive(cascade, scene, naive_policy, *, expect=assert_clear):
    """Compare detections, statistics, and which regions were pooled; return the statistics.

    ``expect`` gets whether all values are far enough from thresholds, and from each other, that
    rounding does not decide.
    """
    objectness = objectness_of(scene)
    naive = naive_twin(cascade, naive_policy).detect(
        scene.features, scene.proposals, scene.image_sizes, objectness
    )
    expect(naive_policy.closest > 1e-5 and are_distinct(naive.detections))
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
    assert_adds_up(stats)
    return stats


def assert_adds_up(stats):
    """Each region is counted once."""
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
        assert_as_naive(cascade, make_scene(seed=seed), naive, expect=assume)


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
    """A threshold that some of the answers above 0 reach."""
    return answers[answers > 0].mean().item()


@pytest.mark.parametrize(
    ("names", "arguments"),
    [
        (("iou_head",), {"localisation": "predicted_iou", "thresholds": (0.5, 0.5)}),
        (("gate",), {"confidence": "learned"}),
        (("iou_head", "gate"), {"confidence": "learned"}),
        (("pruner",), {}),
        (("iou_head", "pruner"), {}),
        (REGION_PARTS, {"confidence": "learned"}),
    ],
)
def test_learned_parts_in_the_naive_cascade(names, arguments):
    parts, scene = make_parts(names=names, hidden=12, crop_channels=CHANNELS), make_scene()
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


def test_redundancy_sees_the_accepted_regions():
    views = []

    def run(**arguments):
        views.clear()
        exits = policy(num_stages=4, thresholds=(0.7, 0.5, 0.4), **arguments)
        decide = exits.decide
        exits.decide = lambda view, _: views.append(view) or decide(view)
        detect(make_cascade(num_stages=4, exits=exits), make_scene())
        return [view.accepted for view in views]

    first, after_one, after_two = run(redundancy_iou=1.0)
    assert first == ()
    for accepted, stages in ((after_one, 1), (after_two, 2)):
        confident = [
            view[torch.nonzero(view.scores >= threshold).squeeze(1)]
            for view, threshold in zip(views[:stages], (0.7, 0.5), strict=False)
        ]
        assert all(map(len, confident))
        for seen, wanted in zip(accepted, confident, strict=True):
            for name in ("boxes", "scores", "classes", "image_index"):
                assert torch.equal(getattr(seen, name), getattr(wanted, name))
    assert run() == [()] * 3  # there is no gate before stage 0


class TestLaws:
    @given(arguments=some_policies(), seed=st.integers(0, 100), agnostic=st.booleans())
    @SOME
    def test_a_batch_equals_its_images_one_by_one(self, arguments, seed, agnostic):
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
        # An image without live regions completes with 0 of them.
        assert stats.left == [{r: n for r, n in counts.items() if n} for counts in left]

    @given(arguments=some_policies(), seed=st.integers(0, 100))
    @SOME
    def test_the_order_of_proposals_does_not_matter(self, arguments, seed):
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
        both = detect_stages(cascade, scene), detect_stages(cascade, permuted)
        for before, after in zip(*both, strict=True):
            boxes = zip(orders, before.boxes_after, after.boxes_after, strict=True)
            for order, plain, others in boxes:
                torch.testing.assert_close(others, plain[order], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("ensemble", ENSEMBLES)
    @pytest.mark.parametrize("confidence", CONFIDENCES)
    def test_exits_after_the_first_stage_equal_a_one_stage_head(self, ensemble, confidence):
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
        assert stats.entered == [41, 0, 0]
        assert stats.left == [{"confident": 41}, {}, {}]
        assert len(pooled) == 1

    @given(
        confidence=st.sampled_from(CONFIDENCES),
        pairs=st.tuples(PAIR, PAIR),
        kind=st.sampled_from(["thresholds", "localisation_thresholds", "prune_thresholds"]),
    )
    @settings(SOME, max_examples=24)
    def test_thresholds_change_the_work_monotonically(self, confidence, pairs, kind):
        low, high = zip(*pairs, strict=True)
        if kind == "prune_thresholds":  # the higher, the more regions are dropped
            low, high = high, low
        always, never = (0.0, 0.0), (9.0, 9.0)
        works = []
        for values in (low, high):
            plain = {
                "thresholds": never if kind == "prune_thresholds" else always,
                "localisation_thresholds": always,
                "prune_thresholds": always,
            }
            exits = policy(
                confidence=confidence, localisation="refinement", **(plain | {kind: values})
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
            learned=make_parts(hidden=12, crop_channels=CHANNELS),
        )
        cascade = make_cascade(exits=exits, ensemble=ensemble)
        detections, stats = detect(cascade, make_scene(num_proposals=counts))
        assert_adds_up(stats)
        for found, count in zip(detections, counts, strict=True):
            assert found.boxes.shape == (len(found), 4)
            assert found.exit_stages.dtype == found.classes.dtype == torch.int64
            assert count or not len(found)

    def test_an_image_without_live_regions_takes_no_work(self):
        cascade, scene = make_cascade(), make_scene()
        # All proposals of image 0 pass the threshold, none of image 1.
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

    @pytest.mark.parametrize(
        ("arguments", "entered"),
        [
            ({"proposal_threshold": 0.999}, [0, 0, 0]),
            ({"prune_thresholds": (1.1, 1.1), "thresholds": (0.0, 0.0)}, [41, 0, 0]),
        ],
    )
    def test_without_live_regions_no_stage_runs(self, arguments, entered):
        cascade = make_cascade(exits=policy(**arguments))
        pooled, _ = record_calls(cascade)
        detections, stats = detect(cascade, make_scene())
        assert len(pooled) == sum(map(bool, entered))
        assert stats.entered == entered
        assert stats.left == [{"background": n} if n else {} for n in entered]
        assert [d.boxes.shape for d in detections] == [(0, 4), (0, 4)]

    @pytest.mark.parametrize("ensemble", ENSEMBLES)
    def test_rules_that_keep_all_regions_change_no_bit(self, ensemble):
        cascade, scene = make_cascade(ensemble=ensemble), make_scene()
        wanted, stats = detect(cascade, scene)
        cascade.exits = policy(
            proposal_threshold=1e-9,
            thresholds=(1.1, 1.1),
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

    @pytest.mark.parametrize("kernel", ["bags", "torchvision"])
    def test_nan_in_one_image_does_not_reach_the_other(self, kernel):
        pooler = RoIPooler(output_size=POOLED, strides=STRIDES, kernel=kernel)
        cascade = make_cascade(pooler=pooler, exits=policy(**EVERY_RULE))
        scene = make_scene(num_proposals=(60, 50))
        wanted, _ = detect(cascade, scene)
        for level in scene.features:
            level[0] = torch.nan
        detections, stats = detect(cascade, scene)
        assert_adds_up(stats)
        assert len(detections[0]) == 0
        assert len(wanted[1]) > 3
        assert_same_detections(detections[1:], wanted[1:])


def test_scores_are_calibrated_by_exit_stage():
    thresholds = {"thresholds": (0.7, 0.6)}
    cascade, scene = make_cascade(exits=policy(**thresholds), score_thresh=0.0), make_scene()
    cascade.selection.nms_thresh, cascade.selection.detections_per_image = 1.0, -1
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


def test_missing_objectness_is_refused_if_it_is_needed():
    cascade, scene = make_cascade(exits=policy(proposal_threshold=0.1)), make_scene()
    with pytest.raises(ValueError, match="objectness"):
        cascade.detect(scene.features, scene.proposals, scene.image_sizes)
    cascade.exits = policy(
        **{**EVERY_RULE, "proposal_threshold": 0.0, "prune_margins": ()}
        | {"region_budget": (0, 7, 3)}
    )
    cascade.detect(scene.features, scene.proposals, scene.image_sizes)


def test_state_dict_names_of_learned_parts():
    parts = make_parts(hidden=12, crop_channels=CHANNELS)
    cascade = make_cascade(exits=policy(learned=parts))
    names = [name for name in cascade.state_dict() if name.startswith("exits.")]
    assert names == [f"exits.learned.{name}" for name in parts.state_dict()]
    assert len(names) > 20


def test_exit_decisions_have_no_gradients():
    parts = make_parts(hidden=12, crop_channels=CHANNELS)
    exits = policy(thresholds=(0.1, 0.1), confidence="learned", learned=parts)
    cascade, scene = make_cascade(exits=exits), make_scene()
    detections, stats = detect(cascade, scene)
    assert 0 < stats.left[0]["confident"] < 41
    sum(found.scores.sum() for found in detections).backward()
    assert all(p.grad is None for p in exits.parameters())

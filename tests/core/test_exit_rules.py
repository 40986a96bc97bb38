"""Every exit rule on its own: by hand, and against plain loops."""

import math

import pytest
import torch
from random_records import make_parts
from region_views import (
    as_accepted,
    as_seen,
    both_policies,
    make_view,
    on_gpu,
    reasons_of,
    view_of,
    view_of_image,
)

from cascade_det.benchmark.pretended_gpu import PretendedGPU
from cascade_det.core.exits.background import KeepNearBest, PruneBelow
from cascade_det.core.exits.budget import RegionBudget
from cascade_det.core.exits.confidence import MEASURES, AcceptConfident
from cascade_det.core.exits.redundancy import DropCovered
from cascade_det.core.structures import nms

SEEDS = range(8)


def mask_of(rule, view):
    assert rule.is_active(view.stage)
    mask = rule.exit_mask(view)
    assert mask.dtype == torch.bool
    return mask.tolist()


CONFIDENT = [
    {
        "confidence": confidence,
        "thresholds": thresholds,
        "localisation": localisation,
        "localisation_thresholds": (0.6, 0.8),
    }
    for confidence, thresholds in (
        ("max_prob", (0.7, 0.5)),
        ("entropy", (0.4, 0.2)),
        ("margin", (0.5, 0.3)),
        ("agreement", (1, 2)),
    )
    for localisation in ("none", "refinement", "predicted_iou")
]


@pytest.mark.parametrize(
    ("reason", "arguments"),
    [
        ("background", {"proposal_threshold": 0.4, "prune_thresholds": (0.3, 0.6)}),
        *(
            ("background", {"prune_margins": (0.15, 0.1, 0.2), "prune_best": best})
            for best in (1, 3, 11, 14)
        ),
        *(("redundant", {"redundancy_iou": iou}) for iou in (0.4, 0.8)),
        *(("confident", arguments) for arguments in CONFIDENT),
    ],
)
@pytest.mark.parametrize("num_accepted", [0, 12])
def test_each_rule_equals_plain_loops(reason, arguments, num_accepted):
    found = set()
    exits, naive = both_policies(**arguments, learned=make_parts(names=("iou_head",)))
    for seed in SEEDS:
        for stage in (-1, 0, 1):
            view = make_view(
                stage=stage,
                seed=seed,
                counts=(15, 1, 0, 12),
                num_classes=3,
                num_accepted=num_accepted if stage >= 0 else 0,
            )
            wanted = naive.decide(stage, as_seen(view), as_accepted(view))
            assert naive.closest > 1e-6
            assert reasons_of(exits.decide(view), len(view)) == wanted
            found |= set(wanted)
    assert found == {None, reason}


class TestPruneBelow:
    def test_at_the_threshold_a_region_stays(self):
        view = view_of([[0.25, 0.5, 0.25], [0.125, 0.25, 0.625], [0.2, 0.125, 0.675]])
        assert mask_of(PruneBelow((0.0, 0.25)), view) == [False, False, True]

    def test_each_gate_has_its_own_threshold(self):
        rule = PruneBelow((0.5, 0.0, 0.3))
        assert [rule.is_active(stage) for stage in (-1, 0, 1)] == [True, False, True]
        view = view_of([[0.25, 0.75], [0.4, 0.6]], stage=1)
        assert mask_of(rule, view) == [True, False]

    def test_before_stage_0_the_objectness_counts(self):
        view = make_view(stage=-1, counts=(3,))
        view.objectness = torch.tensor([0.0, -0.1, 3.0])
        assert mask_of(PruneBelow((0.5, 0.0, 0.0)), view) == [False, True, False]

    def test_a_score_that_is_no_number_stays(self):
        view = view_of([[math.nan, math.nan], [0.1, 0.9]])
        assert mask_of(PruneBelow((0.0, 0.5)), view) == [False, True]


class TestKeepNearBest:
    def test_by_hand(self):
        probs = [[0.9, 0.1], [0.75, 0.25], [0.5, 0.5], [0.4, 0.6], [0.25, 0.75], [0.2, 0.8]]
        view = view_of(probs, image_index=[0, 0, 0, 0, 1, 1])
        # The second best of image 0 has 0.75, that of image 1 0.2.
        kept = [False, False, False, True, False, False]
        assert mask_of(KeepNearBest((1, 0.25), best=2), view) == kept
        # Of fewer than k all stay, of exactly k too.
        assert mask_of(KeepNearBest((1, 0.0), best=3), view) == kept
        assert not any(mask_of(KeepNearBest((1, 0.0), best=4), view))
        assert not any(mask_of(KeepNearBest((1, 0.0), best=5), view))
        assert mask_of(KeepNearBest((1, 0.0), best=1), view) == [False, *[True] * 3, False, True]

    def test_each_gate_has_its_own_margin(self):
        rule = KeepNearBest((1, 0.1, 0.5), best=1)
        assert [rule.is_active(stage) for stage in (-1, 0, 1)] == [False, True, True]
        probs = [[0.9, 0.1], [0.5, 0.5], [0.3, 0.7]]
        assert mask_of(rule, view_of(probs)) == [False, True, True]
        assert mask_of(rule, view_of(probs, stage=1)) == [False, False, True]

    def test_equal_scores_leave_together(self):
        view = view_of([[0.5, 0.5]] * 4)
        assert not any(mask_of(KeepNearBest((1, 0.0), best=2), view))


class TestDropCovered:
    def test_of_a_chain_the_second_goes_and_covers_nothing(self):
        # Each has 4/5 of the one before it, 3/5 of the one before that.
        boxes = [[0.0, 0, 100, 10], [0.0, 0, 80, 10], [0.0, 0, 64, 10]]
        probs = [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]
        assert mask_of(DropCovered(0.75), view_of(probs, boxes=boxes)) == [False, True, False]
        # Without the first the second covers the third.
        rest = view_of(probs[1:], boxes=boxes[1:])
        assert mask_of(DropCovered(0.75), rest) == [False, True]

    @pytest.mark.parametrize("iou", [0.5, 0.6, 0.7, 0.75, 0.8, 0.9])
    @pytest.mark.parametrize("shift", [0.0, 517.0])
    def test_at_the_threshold_a_region_is_covered(self, iou, shift):
        boxes = torch.tensor([[0.0, 0, 100, 10], [0.0, 0, 100 * iou, 10], [200.0, 0, 300, 10]])
        view = view_of([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9]], boxes=(boxes + shift).tolist())
        assert mask_of(DropCovered(iou), view) == [False, True, False]
        assert not any(mask_of(DropCovered(iou + 1e-6), view))

    def test_only_of_its_class_and_image(self):
        box = [0.0, 0.0, 10.0, 10.0]
        probs = [[0.1, 0.8, 0.1], [0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.1, 0.6, 0.3]]
        view = view_of(probs, boxes=[box] * 4, image_index=[0, 0, 1, 1])
        assert mask_of(DropCovered(0.5), view) == [False, False, False, True]

    def test_the_class_is_that_of_the_foreground(self):
        box = [0.0, 0.0, 10.0, 10.0]
        probs = [[0.3, 0.1, 0.6], [0.2, 0.1, 0.7]]
        assert mask_of(DropCovered(0.5), view_of(probs, boxes=[box] * 2)) == [False, True]

    def test_of_equal_scores_the_first_stays(self):
        view = view_of([[0.5, 0.5]] * 3, boxes=[[0.0, 0.0, 10.0, 10.0]] * 3)
        assert mask_of(DropCovered(0.5), view) == [False, True, True]

    def test_accepted_regions_cover_what_they_are_better_than(self):
        box, other = [0.0, 0.0, 10.0, 10.0], [50.0, 0.0, 60.0, 10.0]
        probs = [[0.6, 0.3, 0.1], [0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [0.6, 0.2, 0.2]]
        view = view_of(probs, boxes=[box, other, box, box], image_index=[0, 0, 0, 1])
        view.accepted = [view_of([[0.7, 0.0, 0.3]] * 2, boxes=[box, other])]
        # Worse than the accepted one; better; of another class; of another image.
        assert mask_of(DropCovered(0.5), view) == [True, False, False, False]

    def test_an_empty_box_or_one_that_is_no_number_covers_nothing(self):
        nan = math.nan
        broken = [[5.0, 5, 5, 5], [nan, 0, nan, 10], [nan] * 4]
        boxes = [[0.0, 0, 10, 10], [0.0, 0, 10, 9], *broken, *broken]
        probs = [[0.9, 0.1], [0.8, 0.2], *[[0.95, 0.05]] * 6]
        assert mask_of(DropCovered(0.8), view_of(probs, boxes=boxes)) == [False, True, *[False] * 6]

    def test_is_not_active_before_there_are_classes(self):
        assert not DropCovered(0.5).is_active(-1)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_more_regions_than_one_call_takes_are_decided_alike(self, seed, monkeypatch):
        view = make_view(counts=(60, 1, 0, 50), num_classes=3, num_accepted=20, seed=seed)
        wanted = mask_of(DropCovered(0.5), view)
        monkeypatch.setattr(nms, "_MOST_IN_FLOAT64", 20)
        assert mask_of(DropCovered(0.5), view) == wanted
        assert any(wanted)

    def test_a_fraction_of_a_pixel_decides_in_every_image(self):
        # Of two boxes of nearly 90 of 100 pixels, one is covered from an IoU of 0.9 on.
        boxes = [[0.0, 0, 100, 10], [0.0, 0, 90.004, 10], [0.0, 0, 89.996, 10], [0.0, 0, 1333, 800]]
        probs = [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]]
        view = view_of(
            probs * 200, boxes=boxes * 200, image_index=[i for i in range(200) for _ in boxes]
        )
        assert mask_of(DropCovered(0.9), view) == [False, True, False, False] * 200

    @pytest.mark.parametrize(
        ("counts", "num_classes"), [((40,) * 60, 2), ((9,) * 30, 400), ((700, 3, 600), 1)]
    )
    def test_a_large_batch_is_decided_as_its_images(self, counts, num_classes):
        view = make_view(
            counts=counts, num_classes=num_classes, image_size=(800, 1333), num_accepted=40
        )
        rule = DropCovered(0.85)
        together = rule.exit_mask(view)
        assert 0 < together.sum() < len(view)
        for image in range(0, len(counts), 3):
            own = together[view.image_index == image]
            assert mask_of(rule, view_of_image(view, image)) == own.tolist()


class TestConfidence:
    CERTAIN, EVEN, HALF = [1.0, 0.0, 0.0, 0.0], [0.25] * 4, [0.5, 0.5, 0.0, 0.0]

    @pytest.mark.parametrize(
        ("measure", "probs", "wanted"),
        [
            ("max_prob", CERTAIN, 1.0),
            ("max_prob", EVEN, 0.25),
            ("max_prob", [0.1, 0.2, 0.0, 0.7], 0.2),  # background is no class
            ("entropy", CERTAIN, 1.0),
            ("entropy", EVEN, 0.0),
            ("entropy", HALF, 0.5),  # ln 2 of ln 4
            ("entropy", [0.0, 0.5, 0.25, 0.25], 0.25),  # 3/2 ln 2 of 2 ln 2
            ("entropy", [0.0, 0.0, 0.0, 1.0], 0.0),  # certain of background
            ("margin", CERTAIN, 1.0),
            ("margin", EVEN, 0.0),
            ("margin", [0.5, 0.2, 0.0, 0.3], 0.2),  # the second may be background
            ("margin", [0.5, 0.4, 0.1, 0.0], 0.1),
            ("margin", [0.0, 0.0, 0.2, 0.8], 0.0),
        ],
    )
    def test_by_hand(self, measure, probs, wanted):
        got = MEASURES[measure](view_of([probs, self.EVEN]))
        assert got.shape == (2,)
        assert got[0].item() == pytest.approx(wanted, abs=1e-6)

    def test_agreement_counts_stages_of_foreground(self):
        # Where background is as probable as the class, the class counts.
        probs = [[0.6, 0.1, 0.3], [0.3, 0.1, 0.6], [0.2, 0.5, 0.3], [0.4, 0.2, 0.4]]
        view = view_of(probs, agreements=torch.tensor([2, 2, 0, 1]))
        assert MEASURES["agreement"](view).tolist() == [2.0, 0.0, 0.0, 1.0]

    @pytest.mark.parametrize("measure", ["max_prob", "entropy", "margin"])
    def test_one_class_is_enough(self, measure):
        got = MEASURES[measure](view_of([[1.0, 0.0], [0.5, 0.5], [0.2, 0.8]]))
        assert got.tolist() == pytest.approx(
            [1.0, *{"max_prob": (0.5, 0.2), "entropy": (0, 0), "margin": (0, 0)}[measure]]
        )

    def test_at_the_threshold_a_region_is_accepted(self):
        view = view_of([[0.75, 0.25], [0.74, 0.26]])
        assert mask_of(AcceptConfident(MEASURES["max_prob"], (0.75,)), view) == [True, False]

    def test_each_stage_has_its_own_thresholds(self):
        probs = [[0.75, 0.25], [0.5, 0.5]]
        ious = torch.tensor([0.5, 0.75])
        rule = AcceptConfident(
            MEASURES["max_prob"], (0.7, 0.4), lambda view: view.predicted_ious, (0.5, 0.75)
        )
        assert not rule.is_active(-1)
        assert mask_of(rule, view_of(probs, predicted_ious=ious)) == [True, False]
        assert mask_of(rule, view_of(probs, predicted_ious=ious, stage=1)) == [False, True]


RULES = {
    "prune": lambda _: PruneBelow((0.0, 0.3, 0.3)),
    "near the best": lambda _: KeepNearBest((1.0, 0.2, 0.2), best=4),
    "covered": lambda _: DropCovered(0.4),
    **{
        f"confident by {name}": lambda _, m=measure: AcceptConfident(m, (0.5, 0.5))
        for name, measure in MEASURES.items()
    },
    "budget": lambda _: RegionBudget((0, 4, 4)),
    "learned gate": lambda parts: AcceptConfident(parts.readiness, (0.5, 0.5)),
    "learned pruner": lambda parts: PruneBelow((0.0, 0.5, 0.5), parts.continue_probability),
}


@pytest.mark.parametrize("name", RULES)
@torch.no_grad()
def test_regions_that_are_gone_count_for_nothing(name):
    """Whatever they are: the live ones get the answer that they get alone."""
    parts, on_device = make_parts(), make_parts()
    rule, gpu_rule = RULES[name](parts), RULES[name](on_device)
    for seed in SEEDS:
        view = make_view(stage=1, counts=(12, 5, 0, 9), seed=seed, num_accepted=4)
        gone = torch.rand(len(view), generator=torch.Generator().manual_seed(seed)) < 0.6
        rows = torch.nonzero(~gone).squeeze(1)
        wanted = rule.exit_mask(view[rows])
        assert torch.equal(rule.exit_mask(view.without(gone))[rows], wanted)
        with PretendedGPU() as gpu:
            gpu.move(on_device)
            found = gpu_rule.exit_mask(on_gpu(view, gpu).without(gpu.move(gone))).held
        assert torch.equal(found[rows], wanted)

"""Dynamic R-CNN's statistics against sequences by hand, and in a cascade."""

import copy
import pickle

import pytest
import torch
from small_cascades import NUM_CLASSES, REG_WEIGHTS, make_cascade, make_scene
from training_passes import losses_of

from cascade_det.core.dynamic_targets import DynamicTargets
from cascade_det.core.matching import GroundTruth, LabelledRegions
from cascade_det.core.training_schedule import TrainingSchedule
from cascade_det.core.training_stage import TrainingStage

IOUS = (0.5, 0.6, 0.7)


def targets_of(num_stages=3):
    return [make_cascade(num_stages=num_stages).targets] * num_stages


def regions_of(ious, image_index=None, shifts=()):
    """Regions of these IoUs; the first are foreground, 10 wide, ``shifts`` from their objects."""
    count = len(ious)
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(count, 1)
    gt_boxes = boxes.clone()
    for row, (dx, dy) in enumerate(shifts):
        gt_boxes[row] += torch.tensor([dx, dy, dx, dy])
    classes = [0] * len(shifts) + [NUM_CLASSES] * (count - len(shifts))
    index = torch.tensor(image_index or [0] * count, dtype=torch.int64)
    classes = torch.tensor(classes, dtype=torch.int64)
    gt_index = torch.zeros(count, dtype=torch.int64)
    return LabelledRegions(boxes, index, classes, gt_boxes, torch.tensor(ious), gt_index)


def as_pass(regions):
    count = len(regions)
    return TrainingStage(
        regions, torch.arange(count), torch.zeros(count, NUM_CLASSES + 1), torch.zeros(count, 4)
    )


def objects_in(*images):
    index = torch.tensor(images, dtype=torch.int64)
    return GroundTruth(torch.zeros(len(index), 4), torch.zeros_like(index), index)


def passes_with(dynamic, proposals, stages, *, has_objects=(True,), ground_truth=None):
    """One training pass in which every stage saw such regions."""
    index = torch.zeros(len(proposals), dtype=torch.int64)
    dynamic.observe_proposals(torch.tensor(proposals), index, torch.tensor(has_objects[:1]))
    ground_truth = objects_in(0) if ground_truth is None else ground_truth
    return dynamic.finish_pass(
        [as_pass(r) for r in stages], targets_of(len(stages)), ground_truth, 1
    )


def test_thresholds_are_means_of_the_kth_largest_iou():
    dynamic = DynamicTargets(num_stages=3, k_iou=2, period=2, iou_floor=0.3)
    assert dynamic.ious(IOUS) == pytest.approx((0.3, 0.3, 0.3))
    passes_with(
        dynamic,
        [0.1, 0.9, 0.4, 0.5],  # second: 0.5
        [regions_of([1.0, 1.0]), regions_of([0.5, 0.7, 0.9]), regions_of([0.3, 0.2, 0.1])],
    )
    assert dynamic.ious(IOUS) == pytest.approx((0.3, 0.3, 0.3))
    passes_with(
        dynamic,
        [0.3, 0.1, 0.7],  # second: 0.3; mean of 0.5 and 0.3
        [regions_of([1.0, 1.0]), regions_of([0.4, 0.45]), regions_of([0.25])],
    )
    # Stage 1: (0.7 + 0.4) / 2. Stage 2: (0.2 + 0.25) / 2, below the floor, and below stage 1.
    assert dynamic.ious(IOUS) == pytest.approx((0.4, 0.55, 0.55))
    # The configured thresholds are the upper ends.
    assert dynamic.ious((0.35, 0.5, 0.6)) == pytest.approx((0.35, 0.5, 0.5))


def test_statistics_of_a_period_forget_the_one_before():
    dynamic = DynamicTargets(num_stages=1, k_iou=1, period=1, iou_floor=0.1)
    for best in (0.45, 0.2, 0.35):
        passes_with(dynamic, [best, 0.0], [regions_of([0.0])])
        assert dynamic.ious((0.5,)) == pytest.approx((best,))


def test_images_count_alike_and_those_without_objects_do_not():
    dynamic = DynamicTargets(num_stages=2, k_iou=2, period=1, iou_floor=0.0)
    # Second largest: 0.2 in image 0, 0.4 in image 1 (which has but one), image 2 is empty.
    ious, index = [0.3, 0.4, 0.2, 0.1, 0.0, 0.0], [0, 1, 0, 0, 2, 2]
    dynamic.observe_proposals(
        torch.tensor(ious), torch.tensor(index), torch.tensor([True, True, False])
    )
    passes = [as_pass(regions_of([0.0])), as_pass(regions_of(ious, index))]
    dynamic.finish_pass(passes, targets_of(2), objects_in(0, 1, 1), 3)
    assert dynamic.ious((0.9, 0.9)) == pytest.approx((0.3, 0.3))


def test_without_objects_or_regions_thresholds_stay():
    dynamic = DynamicTargets(num_stages=2, k_iou=2, period=1, iou_floor=0.4)
    for ground_truth, stages in (
        (objects_in(), [regions_of([0.0, 0.0])] * 2),
        (objects_in(0), [regions_of([])] * 2),
    ):
        none = torch.zeros(0)
        dynamic.observe_proposals(none, none.long(), ground_truth.images_with_objects(1))
        dynamic.finish_pass([as_pass(r) for r in stages], targets_of(2), ground_truth, 1)
        assert dynamic.ious((0.5, 0.6)) == pytest.approx((0.4, 0.4))
        assert dynamic.beta(1, 0.0) == 1.0


def test_betas_are_medians_of_the_kth_smallest_offset():
    dynamic = DynamicTargets(num_stages=2, k_iou=0, k_beta=2, period=3)
    # Offsets in widths, times 10 at stage 0 and 20 at stage 1: mean of |dx|, |dy| of a region.
    of_passes = [
        # Offsets 0.5, 1.5 and 0.2 at stage 0: the second smallest is 0.5. The first is an object.
        [(0, 0), (0.4, -0.6), (3, 0), (0.4, 0.0)],
        [(0.6, 0.2), (0, 0), (0.1, 0.1)],  # 0.4 and 0.1: 0.4
        [(0.3, 0.3)],  # one alone: 0.3
    ]
    for number, shifts in enumerate(of_passes):
        assert dynamic.beta(0, 0.0) == 1.0
        both = [regions_of([0.5] * 5, shifts=shifts)] * 2
        metrics = dynamic.finish_pass(
            [as_pass(r) for r in both], targets_of(2), objects_in(0), num_images=1
        )
        assert metrics["stage0/smooth_l1_beta"] == 0.0, number
    # The configured ones.
    assert REG_WEIGHTS[1][0] == 2 * REG_WEIGHTS[0][0]
    assert dynamic.beta(0, 0.0) == pytest.approx(0.4)
    assert dynamic.beta(1, 0.0) == pytest.approx(0.8)
    assert dynamic.ious((0.5, 0.6)) == (0.5, 0.6)


def test_the_median_is_the_upper_one_of_the_passes_with_foreground():
    dynamic = DynamicTargets(num_stages=1, k_iou=0, k_beta=1, period=5, beta_start=0.45)
    for shift in (0.2, None, 0.4, 0.3, 0.6):
        shifts = [] if shift is None else [(shift, shift)]
        regions = regions_of([0.5] * 2, shifts=shifts)
        dynamic.finish_pass([as_pass(regions)], targets_of(1), objects_in(0), num_images=1)
    assert dynamic.beta(0, 0.0) == pytest.approx(0.4)
    for _ in range(5):  # 0.9 is above the start
        regions = regions_of([0.5] * 2, shifts=[(0.9, 0.9)])
        dynamic.finish_pass([as_pass(regions)], targets_of(1), objects_in(0), num_images=1)
    assert dynamic.beta(0, 0.0) == pytest.approx(0.45)


def test_k_counts_for_each_image():
    dynamic = DynamicTargets(num_stages=1, k_iou=0, k_beta=1, period=1)
    regions = regions_of([0.5] * 3, image_index=[0, 0, 1], shifts=[(0.1, 0.1), (0.2, 0.2)])
    dynamic.finish_pass([as_pass(regions)], targets_of(1), objects_in(0), num_images=2)
    assert dynamic.beta(0, 0.0) == pytest.approx(0.2)


def dynamic_cascade(**changes):
    arguments = {
        "k_iou": 5,
        "k_beta": 2,
        "period": 2,
        "iou_floor": 0.3,
        "beta_start": 9.0,
    } | changes
    dynamic = DynamicTargets(num_stages=3, **arguments)
    return make_cascade(regime=TrainingSchedule(num_stages=3, dynamic=dynamic))


def test_a_cascade_is_trained_towards_the_current_targets():
    cascade, scene = dynamic_cascade(), make_scene(num_proposals=(60, 50))
    wanted = make_cascade(ious=(0.3,) * 3, smooth_l1_beta=9.0)
    assert losses_of(cascade, scene) == losses_of(wanted, scene)
    # Within a period nothing changes.
    assert losses_of(cascade, scene) == losses_of(wanted, scene)
    ious = cascade.regime.dynamic.ious(IOUS)
    assert 0.3 < ious[0] <= 0.5
    assert ious[0] <= ious[1] <= ious[2] <= 0.7
    betas = [cascade.regime.dynamic.beta(stage, 0.0) for stage in range(3)]
    assert all(0 < beta < 9 for beta in betas)
    losses = losses_of(cascade, scene)
    for stage, beta in enumerate(betas):
        now = losses_of(make_cascade(ious=ious, smooth_l1_beta=beta), scene)
        for name in (f"loss_cls_stage{stage}", f"loss_box_reg_stage{stage}"):
            torch.testing.assert_close(losses[name], now[name])
        assert cascade.metrics[f"stage{stage}/iou_threshold"] == pytest.approx(ious[stage])
        assert cascade.metrics[f"stage{stage}/smooth_l1_beta"] == pytest.approx(beta)


def test_stage_0_counts_proposals_that_were_not_sampled():
    scene = make_scene(num_proposals=(60, 50))
    found = []
    for drawn in (4, 512):
        cascade = dynamic_cascade(period=1)
        cascade.targets = copy.copy(cascade.targets)
        object.__setattr__(cascade.targets, "batch_size_per_image", drawn)
        losses_of(cascade, scene)
        found.append(cascade.regime.dynamic.iou_statistics[0])
    assert found[0] == found[1]


def test_evaluation_changes_nothing_and_has_the_configured_targets():
    cascade, scene = dynamic_cascade(period=1), make_scene()
    before = copy.deepcopy(cascade.state_dict())
    losses = losses_of(cascade.eval(), scene)
    assert losses == losses_of(make_cascade(), scene)
    after = cascade.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_resumed_training_is_bit_equal_in_the_middle_of_a_period():
    straight, scene = dynamic_cascade(period=3), make_scene(num_proposals=(60, 50))
    history = [losses_of(straight, scene) for _ in range(4)]
    state = copy.deepcopy(straight.state_dict())
    history += [losses_of(straight, scene) for _ in range(5)]
    resumed = dynamic_cascade(period=3)
    losses_of(resumed, scene)
    resumed.load_state_dict(state)
    assert [losses_of(resumed, scene) for _ in range(5)] == history[4:]
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    names = {n for n in state if "regime" in n}
    assert names == {
        f"regime.dynamic.{name}"
        for name in (
            "iou_statistics",
            "iou_sums",
            "iou_counts",
            "betas",
            "beta_history",
            "passes",
        )
    }
    assert pickle.loads(pickle.dumps(resumed)).regime.dynamic.ious(IOUS)

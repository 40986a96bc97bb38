"""Training: regions, labels and losses of each stage, and gradients of the features."""

import math

import pytest
import torch
from naive_cascade import iou
from small_cascades import (
    NUM_CLASSES,
    REG_WEIGHTS,
    STRIDES,
    label_scene,
    make_cascade,
    make_scene,
    naive_twin,
)
from torch.nn import functional as F

from cascade_det.core import RoIPooler
from cascade_det.core.losses import BOX_LOSSES
from cascade_det.core.matching import GroundTruth, LabelledRegions
from cascade_det.core.training_stage import TrainingStage


def losses_of_all(cascade, scene):
    return cascade.losses_of_regions(
        scene.features, label_scene(scene, 0.5), scene.ground_truth, scene.image_sizes
    )


def naive_labels(boxes, image_index, scene, iou_threshold):
    """(class, box of its object) of each region, by a loop."""
    labels = []
    for box, image in zip(boxes, image_index, strict=True):
        overlaps = [iou(box, other) for other in scene.gt_boxes[image].tolist()]
        best = max(range(len(overlaps)), key=overlaps.__getitem__)
        is_foreground = overlaps[best] >= iou_threshold
        label = scene.gt_classes[image][best].item() if is_foreground else NUM_CLASSES
        labels.append((label, scene.gt_boxes[image][best].tolist()))
    return labels


def naive_delta(box, target, weights):
    width, height = box[2] - box[0], box[3] - box[1]
    goal_width, goal_height = target[2] - target[0], target[3] - target[1]
    return [
        weights[0] * ((target[0] + goal_width / 2) - (box[0] + width / 2)) / width,
        weights[1] * ((target[1] + goal_height / 2) - (box[1] + height / 2)) / height,
        weights[2] * math.log(goal_width / width),
        weights[3] * math.log(goal_height / height),
    ]


def naive_losses(cascade, scene, features):
    """Losses of all stages by loops over regions, with plain autograd and no scaled gradients."""
    twin, ious = naive_twin(cascade), cascade.targets.ious
    beta = cascade.targets.smooth_l1_beta
    boxes = [tuple(box) for image in scene.proposals for box in image.tolist()]
    images = [i for i, image in enumerate(scene.proposals) for _ in image]
    losses = {}
    for stage in range(cascade.num_stages):
        labels = naive_labels(boxes, images, scene, ious[stage])
        cls_loss, box_loss, moved = 0.0, 0.0, []
        for box, image, (label, target) in zip(boxes, images, labels, strict=True):
            crop = twin.pool([level.double() for level in features], image, box).float()
            logits, deltas = cascade.box_predictor[stage](cascade.box_head[stage](crop))
            logits, deltas = logits[0], deltas[0]
            cls_loss = cls_loss - torch.log_softmax(logits, 0)[label]
            by_class = deltas.view(-1, 4)
            chosen = label if label < NUM_CLASSES else int(logits[:-1].argmax())
            own = by_class[chosen if len(by_class) > 1 else 0]
            if label < NUM_CLASSES:
                wanted = own.new_tensor(naive_delta(box, target, REG_WEIGHTS[stage]))
                box_loss = box_loss + F.smooth_l1_loss(own, wanted, reduction="sum", beta=beta)
            moved.append((twin.move(box, own.tolist(), stage, scene.image_sizes[image]), image))
        losses[f"loss_cls_stage{stage}"] = cls_loss / len(boxes)
        losses[f"loss_box_reg_stage{stage}"] = box_loss / len(boxes)
        moved = [(box, image) for box, image in moved if box[2] > box[0] and box[3] > box[1]]
        boxes, images = zip(*moved, strict=True)
    return losses


@pytest.mark.parametrize("cls_agnostic", [True, False])
@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_losses_and_gradients_equal_a_loop_over_regions(cls_agnostic, num_stages, beta):
    cascade = make_cascade(num_stages=num_stages, cls_agnostic=cls_agnostic, smooth_l1_beta=beta)
    scene = make_scene(num_proposals=(14, 10))
    scene.features = [level.requires_grad_() for level in scene.features]
    parameters = dict(cascade.named_parameters())
    inputs = [*scene.features, *parameters.values()]
    results = []
    for losses in (losses_of_all(cascade, scene), naive_losses(cascade, scene, scene.features)):
        gradients = torch.autograd.grad(sum(losses.values()), inputs, materialize_grads=True)
        results.append((losses, gradients))
    (losses, gradients), (wanted, wanted_gradients) = results
    assert list(losses) == list(wanted)
    assert all(float(value.detach()) > 0 for value in wanted.values())
    torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-4)
    levels = len(STRIDES)
    # The sum of S losses reaches the features divided by S, and the heads as it is.
    for got, unscaled in zip(gradients[:levels], wanted_gradients[:levels], strict=True):
        assert unscaled.abs().max() > 0
        torch.testing.assert_close(got, unscaled / num_stages, rtol=1e-3, atol=1e-3)
    for got, unscaled in zip(gradients[levels:], wanted_gradients[levels:], strict=True):
        torch.testing.assert_close(got, unscaled, rtol=1e-3, atol=1e-3)


def test_features_that_need_no_gradient_train_the_heads_alone():
    cascade, scene = make_cascade(), make_scene()
    sum(losses_of_all(cascade, scene).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in cascade.parameters())


@pytest.mark.parametrize("loss_type", BOX_LOSSES)
def test_no_gradient_flows_through_boxes(loss_type):
    cascade, scene = make_cascade(box_reg_loss_type=loss_type), make_scene()
    losses = losses_of_all(cascade, scene)
    parameters = dict(cascade.named_parameters())
    for stage in range(3):
        total = losses[f"loss_cls_stage{stage}"] + losses[f"loss_box_reg_stage{stage}"]
        gradients = torch.autograd.grad(
            total, parameters.values(), retain_graph=True, allow_unused=True
        )
        used = {n for n, g in zip(parameters, gradients, strict=True) if g is not None}
        assert used == {name for name in parameters if name.split(".")[1] == str(stage)}


def test_weights_of_stages_and_of_the_box_loss():
    scene = make_scene()
    plain = losses_of_all(make_cascade(), scene)
    weighted = losses_of_all(
        make_cascade(stage_loss_weights=(1.0, 0.5, 0.25), box_reg_loss_weight=3.0), scene
    )
    for stage, weight in enumerate((1.0, 0.5, 0.25)):
        for name, factor in (("loss_cls", weight), ("loss_box_reg", 3.0 * weight)):
            key = f"{name}_stage{stage}"
            torch.testing.assert_close(weighted[key], factor * plain[key])


@pytest.mark.parametrize("loss_type", BOX_LOSSES)
def test_box_loss_is_divided_by_all_regions(loss_type):
    cascade = make_cascade(num_stages=1, box_reg_loss_type=loss_type)
    targets, regions = cascade.targets, label_scene(make_scene(), 0.5)
    logits, deltas = torch.randn(len(regions), NUM_CLASSES + 1), torch.randn(len(regions), 4)
    foreground = regions.gt_classes < NUM_CLASSES
    assert 0 < foreground.sum() < len(regions)
    everything = TrainingStage(regions, torch.arange(len(regions)), logits, deltas)
    with_background = targets.regression_loss(0, everything)
    rows = torch.nonzero(foreground).squeeze(1)
    objects = TrainingStage(regions[rows], rows, logits[rows], deltas[rows])
    without = targets.regression_loss(0, objects)
    torch.testing.assert_close(with_background, without * len(rows) / len(regions))


def shifting_cascade(**changes):
    """A cascade whose first stage moves every box right by its own width."""
    cascade = make_cascade(**changes)
    with torch.no_grad():
        for predictor in cascade.box_predictor:
            predictor.bbox_pred.weight.zero_()
            predictor.bbox_pred.bias.zero_()
        cascade.box_predictor[0].bbox_pred.bias[0] = REG_WEIGHTS[0][0]
    return cascade


def test_boxes_are_refined_clipped_and_dropped_when_empty():
    cascade, scene = shifting_cascade(), make_scene(num_proposals=(0, 0))
    scene.proposals[0] = torch.tensor([[0.0, 0.0, 20.0, 30.0], [290.0, 10.0, 320.0, 50.0]])
    scene.proposals[1] = torch.tensor([[250.0, 40.0, 270.0, 60.0]])
    seen = []
    cascade.pooler.register_forward_hook(lambda _, inputs, output: seen.append(inputs[1:]))
    losses_of_all(cascade, scene)
    assert seen[0][0].tolist() == [[0, 0, 20, 30], [290, 10, 320, 50], [250, 40, 270, 60]]
    # The second has left image 0 (320 wide); the third ends at the border of image 1 (280 wide).
    for boxes, image_index in seen[1:]:
        torch.testing.assert_close(boxes, torch.tensor([[20.0, 0, 40, 30], [270, 40, 280, 60]]))
        assert image_index.tolist() == [0, 1]
        assert not boxes.requires_grad


def regions_by_hand(boxes, gt_classes):
    count = len(boxes)
    return LabelledRegions(
        torch.tensor(boxes),
        torch.zeros(count, dtype=torch.int64),
        torch.tensor(gt_classes),
        torch.zeros(count, 4),
        torch.zeros(count),
        torch.zeros(count, dtype=torch.int64),
    )


def test_metrics_by_hand():
    targets = make_cascade().targets
    regions = regions_by_hand([[0.0, 0, 1, 1]] * 5, [0, 1, 2, NUM_CLASSES, NUM_CLASSES])
    regions.ious = torch.tensor([0.5, 0.6, 0.7, 0.1, 0.0])
    refined = regions_by_hand([[0.0, 0, 1, 1]] * 5, [0] * 5)
    refined.ious = torch.tensor([0.6, 0.6, 0.9, 0.8, 0.0])
    # Right, wrong, missed; one background right and one taken for an object.
    logits = 9 * F.one_hot(torch.tensor([0, 0, 3, 3, 1]), NUM_CLASSES + 1).float()
    metrics = targets.metrics(1, logits, regions, refined, num_images=2)
    assert {name: pytest.approx(float(value)) for name, value in metrics.items()} == {
        "stage1/roi_head/num_fg_samples": 1.5,
        "stage1/roi_head/num_bg_samples": 1,
        "stage1/fast_rcnn/cls_accuracy": 2 / 5,
        "stage1/fast_rcnn/fg_cls_accuracy": 1 / 3,
        "stage1/fast_rcnn/false_negative": 1 / 3,
        "stage1/iou_before": 0.6,
        "stage1/iou_after": 0.7,
        "stage1/nonfinite_boxes": 0,
    }
    refined.boxes[3, 2], refined.boxes[4] = torch.nan, torch.nan
    assert targets.metrics(1, logits, regions, refined, 2)["stage1/nonfinite_boxes"] == 2


def test_losses_fill_the_metrics_of_every_stage():
    cascade, scene = make_cascade(), make_scene()
    cascade.losses(scene.features, scene.proposals, *scene.targets, scene.image_sizes)
    assert len(cascade.metrics) == 3 * 8
    assert {name.split("/")[0] for name in cascade.metrics} == {"stage0", "stage1", "stage2"}


@pytest.mark.parametrize("append", [True, False])
def test_ground_truth_is_added_to_the_proposals_if_configured(append):
    scene = make_scene(num_proposals=(5, 5))
    cascade = make_cascade(
        proposal_append_gt=append, batch_size_per_image=100, positive_fraction=1.0
    )
    targets = cascade.targets
    candidates = targets.candidates(scene.proposals, scene.gt_boxes, scene.ground_truth)
    sampled = targets.sample(candidates, num_images=2)
    assert len(sampled) == (10 + 4 + 3 if append else 10)
    exact = sampled.ious == 1
    assert exact.sum() == (7 if append else 0)
    wanted = {tuple(box) for boxes in scene.gt_boxes for box in boxes.tolist()}
    assert {tuple(box) for box in sampled.boxes[exact].tolist()} == (wanted if append else set())


def test_samples_are_labelled_by_the_iou_of_the_first_stage():
    targets = make_cascade(proposal_append_gt=False).targets
    objects = [torch.tensor([[0.0, 0, 10, 10]])]
    ground_truth = GroundTruth(objects[0], torch.tensor([1]), torch.tensor([0]))
    overlaps = [torch.tensor([[0.0, 0, 10, 4.5], [0, 0, 10, 5.5], [0, 0, 10, 6.5]])]
    sampled = targets.sample(targets.candidates(overlaps, objects, ground_truth), num_images=1)
    by_iou = sorted(zip(sampled.ious.tolist(), sampled.gt_classes.tolist(), strict=True))
    assert [label for _, label in by_iou] == [NUM_CLASSES, 1, 1]


def test_losses_depend_on_the_seed_alone():
    cascade, scene = make_cascade(), make_scene(num_proposals=(60, 50))

    def losses(seed):
        torch.manual_seed(seed)
        return cascade.losses(scene.features, scene.proposals, *scene.targets, scene.image_sizes)

    first, again, other = losses(1), losses(1), losses(2)
    assert first == again
    assert first["loss_cls_stage0"] != other["loss_cls_stage0"]


def test_kernels_train_alike():
    scene, results = make_scene(), []
    for kernel in ("bags", "torchvision"):
        pooler = RoIPooler(output_size=3, strides=STRIDES, kernel=kernel)
        cascade = make_cascade(pooler=pooler)
        features = [level.clone().requires_grad_() for level in scene.features]
        scene.features = features
        losses = losses_of_all(cascade, scene)
        results.append((losses, torch.autograd.grad(sum(losses.values()), features)))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)

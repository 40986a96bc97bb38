"""Training of learned exits: labels against loops, weights, closed forms, and that they learn."""

import math

import pytest
import torch
from naive_cascade import iou
from random_records import make_parts, make_recorded_scene
from small_cascades import CHANNELS, make_cascade, make_scene, objectness_of

from cascade_det.core import CascadeInputs, ExitPolicy
from cascade_det.core.exit_losses import (
    draw_live_rows,
    ends_as_true_positive,
    exit_losses,
    loses_nothing,
)
from cascade_det.core.exits.learned import REGION_PARTS

SCENES = [
    {"seed": 0},
    {"seed": 1, "cls_agnostic": False},
    {"seed": 2, "num_classes": 1},
    {"seed": 3, "num_proposals": (60, 0, 15, 1), "num_objects": (9, 2, 0, 1)},
    {"seed": 4, "num_objects": (0, 0)},
    {"seed": 5, "num_stages": 1},
]


def brute_force_true_positives(scene):
    """Rows of regions that find an object: NMS, the best few, then objects by falling score."""
    record, last = scene.record, scene.record.stages[-1]
    probs = (last.score_state / record.num_stages).tolist()
    decoded = last.decoded.unflatten(1, (-1, 4)).tolist()
    rows = set()
    for image in range(record.num_images):
        found = [
            (probs[row][label], row, label, decoded[row][label if len(decoded[row]) > 1 else 0])
            for row in torch.nonzero(record.image_index == image).squeeze(1).tolist()
            for label in range(len(probs[row]) - 1)
            if probs[row][label] > record.selection.score_thresh
        ]
        kept = []
        for one in sorted(found, key=lambda f: -f[0]):
            rivals = [other for other in kept if other[2] == one[2]]
            if all(iou(one[3], other[3]) <= record.selection.nms_thresh for other in rivals):
                kept.append(one)
        classes = scene.gt_classes[image].tolist()
        free = dict(enumerate(scene.gt_boxes[image].tolist()))
        for _, row, label, box in kept[: record.selection.detections_per_image]:
            overlaps = {i: iou(box, free[i]) for i in free if classes[i] == label}
            best = max(overlaps, key=overlaps.get, default=None)
            if best is not None and overlaps[best] >= 0.5:
                rows.add(row)
                del free[best]
    return rows


def brute_force_ready(scene, stage):
    """Rows of regions whose box is right, and no worse for COCO than that of the last stage."""
    record = scene.record
    early, last = (record.stages[s].decoded.unflatten(1, (-1, 4)).tolist() for s in (stage, -1))
    rows = set()
    for row, image in enumerate(record.image_index.tolist()):
        label = record.stages[stage].score_state[row, :-1].argmax().item()
        column = label if len(early[row]) > 1 else 0
        boxes = scene.gt_boxes[image][scene.gt_classes[image] == label].tolist()
        best = max(boxes, key=lambda b: iou(early[row][column], b), default=None)
        if best is None:
            continue
        now, then = (
            sum(iou(boxes[row][column], best) >= t / 100 for t in range(50, 100, 5))
            for boxes in (early, last)
        )
        if now > 0 and now >= then:
            rows.add(row)
    return rows


def rows_of(mask):
    return set(torch.nonzero(mask).squeeze(1).tolist())


@pytest.mark.parametrize(
    "kwargs",
    [
        *SCENES,
        *(
            {"seed": seed, "num_proposals": (25, 10), "cls_agnostic": seed % 2 == 0}
            for seed in range(20)
        ),
    ],
)
def test_labels_equal_brute_force(kwargs):
    scene = make_recorded_scene(**kwargs)
    found = ends_as_true_positive(scene.record, scene.ground_truth)
    assert rows_of(found) == brute_force_true_positives(scene)
    assert found.any() == any(len(boxes) for boxes in scene.gt_boxes)
    for stage in range(scene.record.num_stages - 1):
        ready = loses_nothing(scene.record, scene.ground_truth, stage)
        assert rows_of(ready) == brute_force_ready(scene, stage)
        if kwargs in SCENES[:2]:
            assert 0.02 < found.float().mean() < 0.6
            assert 0.02 < ready.float().mean() < 0.6


def test_an_object_is_found_once():
    """Of two regions on one object that NMS keeps, the better one is the true positive."""
    scene = make_recorded_scene(num_proposals=(2,), num_objects=(1,), num_classes=1)
    last = scene.record.stages[-1]
    scene.gt_boxes[0][:] = torch.tensor([10.0, 10, 110, 110])
    last.decoded[:] = torch.tensor([[10.0, 10, 110, 70], [10, 50, 110, 110]])  # IoU 0.6 each, 0.2
    last.score_state[:] = torch.tensor([[1.2, 1.8], [1.8, 1.2]])
    assert ends_as_true_positive(scene.record, scene.ground_truth).tolist() == [False, True]


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("names", [REGION_PARTS, *((name,) for name in REGION_PARTS)])
def test_names_of_losses(names, num_stages):
    scene = make_recorded_scene(num_stages=num_stages)
    losses = exit_losses(
        make_parts(names=names, num_stages=num_stages), scene.record, *scene.targets
    )
    wanted = {
        "iou_head": {f"loss_exit_iou_stage{s}" for s in range(num_stages)},
        "gate": {f"loss_exit_gate_stage{s}" for s in range(num_stages - 1)},
        "pruner": {f"loss_exit_pruner_gate{g}" for g in range(num_stages)},
    }
    assert set(losses) == set().union(*(wanted[name] for name in names))
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("kwargs", SCENES[:5])
def test_losses_equal_sums_over_regions(kwargs):
    scene, parts = make_recorded_scene(**kwargs), make_parts()
    record, ground_truth = scene.record, scene.ground_truth
    losses = exit_losses(parts, record, *scene.targets, smallest_share=1.0)

    images = record.image_index.tolist()
    found = brute_force_true_positives(scene)
    for stage in (-1, 0, 1):
        answers = parts.continue_probability(record.view(stage)).tolist()
        total = weights = 0.0
        for row, image in enumerate(images):
            mates = [r for r in range(len(images)) if images[r] == image]
            alike = [r for r in mates if (r in found) == (row in found)]
            weight = (2 if row in found else 1) * len(mates) / (2 * len(alike))
            total -= weight * math.log(answers[row] if row in found else 1 - answers[row])
            weights += weight
        got = losses[f"loss_exit_pruner_gate{stage + 1}"].item()
        assert got == pytest.approx(total / weights, rel=1e-4)

    for stage in (0, 1):
        view = record.view(stage)
        answers, ready = parts.readiness(view).tolist(), brute_force_ready(scene, stage)
        rows = torch.nonzero(view.is_foreground).squeeze(1).tolist()
        terms = [-math.log(answers[r] if r in ready else 1 - answers[r]) for r in rows]
        wanted = sum(terms) / len(terms)
        assert losses[f"loss_exit_gate_stage{stage}"].item() == pytest.approx(wanted, rel=1e-4)

    for stage in range(3):
        recorded = record.stages[stage]
        answers = parts.predict_ious(stage, recorded.hidden).tolist()
        groups = {True: [], False: []}
        for row, box in enumerate(recorded.boxes.tolist()):
            objects = scene.gt_boxes[images[row]].tolist()
            best = max((iou(box, other) for other in objects), default=0.0)
            groups[best >= 0.5].append((answers[row] - best) ** 2)
        means = [sum(group) / len(group) for group in groups.values() if group]
        wanted = sum(means) / len(means)
        assert losses[f"loss_exit_iou_stage{stage}"].item() == pytest.approx(wanted, rel=1e-4)
    assert len(ground_truth.boxes) == sum(len(b) for b in scene.gt_boxes)


def test_only_the_parts_get_gradients():
    scene, parts = make_recorded_scene(), make_parts()
    for stage in scene.record.stages:
        stage.hidden.requires_grad_()
    sum(exit_losses(parts, scene.record, *scene.targets).values()).backward()
    assert all(stage.hidden.grad is None for stage in scene.record.stages)
    for name, parameter in parts.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_cascade_trains_its_exits_and_nothing_else():
    parts = make_parts(hidden=12, crop_channels=CHANNELS)
    cascade = make_cascade(exits=ExitPolicy(num_stages=3, learned=parts))
    scene = make_scene()
    inputs = CascadeInputs(scene.features, scene.proposals, scene.image_sizes, objectness_of(scene))
    sum(cascade.exit_losses(inputs, *scene.targets).values()).backward()
    trained = {name for name, p in cascade.named_parameters() if p.grad is not None}
    assert trained == {f"exits.learned.{name}" for name in parts.state_dict()}


def test_without_regions_losses_are_zero_and_have_gradients():
    scene, parts = make_recorded_scene(num_proposals=(0, 0)), make_parts()
    losses = exit_losses(parts, scene.record, *scene.targets)
    assert all(loss.item() == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in parts.parameters())


def test_a_gate_without_foreground_has_a_loss_of_zero():
    scene, parts = make_recorded_scene(), make_parts()
    for stage in scene.record.stages:
        stage.score_state[:, -1] = 100.0
    losses = exit_losses(parts, scene.record, *scene.targets)
    sum(losses.values()).backward()
    assert losses["loss_exit_gate_stage0"] == 0
    assert all(p.grad.eq(0).all() for p in parts.gate.parameters())


def test_live_rows_are_the_best_of_each_image():
    view = make_recorded_scene(num_proposals=(40, 0, 3) * 40, num_objects=(1,) * 120).record.view(0)
    rows = draw_live_rows(view, 1 / 32)
    live = torch.zeros(len(view), dtype=torch.bool)
    live[rows] = True
    assert rows.tolist() == sorted(rows.tolist())
    counts = []
    for image in range(0, 120, 3):
        of_image = view.image_index == image
        best, rest = view.scores[of_image & live], view.scores[of_image & ~live]
        assert len(best) >= 1
        assert not len(rest) or best.min() >= rest.max()
        counts.append(len(best))
    assert 10 < counts.count(40) < 30  # half of them
    assert len(set(counts)) > 8
    assert len(draw_live_rows(view, 1.0)) == len(view)


def area_under_curve(scores, labels):
    """The probability that a positive scores above a negative."""
    positive, negative = scores[labels], scores[~labels]
    return (positive[:, None] > negative).float().mean().item()


def with_informative_hidden(scene):
    """The same scene, where the IoU of a box is among its hidden features."""
    for stage in scene.record.stages:
        for row, image in enumerate(scene.record.image_index.tolist()):
            objects = scene.gt_boxes[image].tolist()
            best = max((iou(stage.boxes[row].tolist(), other) for other in objects), default=0.0)
            stage.hidden[row, 0] = 4 * best - 2
            stage.predicted_ious[row] = best
    return scene


def test_all_parts_learn():
    """Trained on six scenes, tested on three others."""
    scenes = [with_informative_hidden(make_recorded_scene(seed=seed)) for seed in range(9)]
    parts = make_parts()
    optimizer = torch.optim.Adam(parts.parameters(), lr=0.02)
    for step in range(90):
        scene = scenes[step % 6]
        optimizer.zero_grad()
        sum(exit_losses(parts, scene.record, *scene.targets).values()).backward()
        optimizer.step()
    outcomes = {"pruner": [], "gate": [], "iou_head": []}
    with torch.no_grad():
        for scene in scenes[6:]:
            view, stage = scene.record.view(1), scene.record.stages[1]
            ground_truth = scene.ground_truth
            found = ends_as_true_positive(scene.record, ground_truth)
            outcomes["pruner"].append((parts.continue_probability(view), found))
            ready, foreground = loses_nothing(scene.record, ground_truth, 1), view.is_foreground
            outcomes["gate"].append((parts.readiness(view)[foreground], ready[foreground]))
            predicted = parts.predict_ious(1, stage.hidden)
            outcomes["iou_head"].append((predicted, stage.predicted_ious))
    pooled = {name: [torch.cat(t) for t in zip(*o, strict=True)] for name, o in outcomes.items()}
    assert area_under_curve(*pooled["pruner"]) > 0.75
    assert area_under_curve(*pooled["gate"]) > 0.7
    predicted, true = pooled["iou_head"]
    assert (predicted - true).abs().mean() < 0.06

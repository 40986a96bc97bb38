"""Labels against a loop over pairs; samples against what a minibatch promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_cascade import iou
from small_cascades import NUM_CLASSES, label_scene, make_cascade, make_scene, random_boxes

from cascade_det.core.matching import GroundTruth, label_regions, sample_labels


def brute_force_labels(scene, iou_threshold):
    """(class, box of the best object or None, best IoU) of each proposal."""
    wanted = []
    for image, boxes in enumerate(scene.proposals):
        objects = scene.gt_boxes[image].tolist()
        for box in boxes.tolist():
            overlaps = [iou(box, other) for other in objects]
            best = max(range(len(objects)), key=overlaps.__getitem__, default=None)
            if best is None or overlaps[best] < iou_threshold:
                wanted.append((NUM_CLASSES, None, overlaps[best] if objects else 0.0))
            else:
                label = scene.gt_classes[image][best].item()
                wanted.append((label, objects[best], overlaps[best]))
    return wanted


@pytest.mark.parametrize("iou_threshold", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("num_objects", [(4, 3), (0, 5), (0, 0)])
def test_labels_equal_brute_force(iou_threshold, num_objects):
    scene = make_scene(num_objects=num_objects, num_proposals=(40, 30))
    labelled = label_scene(scene, iou_threshold)
    wanted = brute_force_labels(scene, iou_threshold)
    assert labelled.gt_classes.tolist() == [label for label, _, _ in wanted]
    torch.testing.assert_close(labelled.ious, torch.tensor([overlap for _, _, overlap in wanted]))
    foreground = [i for i, (label, _, _) in enumerate(wanted) if label < NUM_CLASSES]
    assert bool(foreground) == any(num_objects)
    wanted_boxes = torch.tensor([wanted[i][1] for i in foreground]).view(-1, 4)
    torch.testing.assert_close(labelled.gt_boxes[foreground], wanted_boxes)


def test_objects_of_another_image_do_not_count():
    box = torch.tensor([[10.0, 10.0, 30.0, 30.0]])
    ground_truth = GroundTruth(box, torch.tensor([1]), torch.tensor([0]))
    labelled = label_regions(
        box.repeat(2, 1),
        torch.tensor([0, 1]),
        ground_truth,
        iou_threshold=0.5,
        num_classes=NUM_CLASSES,
    )
    assert labelled.gt_classes.tolist() == [1, NUM_CLASSES]
    assert labelled.ious.tolist() == [1.0, 0.0]


def test_foreground_starts_at_the_threshold_itself():
    ground_truth = GroundTruth(
        torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([2]), torch.tensor([0])
    )
    half, less = [0.0, 0, 10, 5], [0.0, 0, 10, 4.99]
    boxes, images = torch.tensor([half, less]), torch.zeros(2, dtype=torch.int64)
    labelled = label_regions(
        boxes, images, ground_truth, iou_threshold=0.5, num_classes=NUM_CLASSES
    )
    assert labelled.gt_classes.tolist() == [2, NUM_CLASSES]


def test_no_regions():
    labelled = label_scene(make_scene(num_proposals=(0, 0)), 0.5)
    assert len(labelled) == 0
    assert labelled.gt_boxes.shape == (0, 4)


@given(
    labels=st.lists(st.integers(-1, NUM_CLASSES), max_size=40),
    num_samples=st.integers(1, 30),
    positive_fraction=st.floats(0, 1),
    seed=st.integers(0, 100),
)
@settings(max_examples=200)
def test_a_sample_keeps_its_promises(labels, num_samples, positive_fraction, seed):
    torch.manual_seed(seed)
    positive, negative = sample_labels(
        torch.tensor(labels, dtype=torch.int64),
        num_samples=num_samples,
        positive_fraction=positive_fraction,
        negative_label=NUM_CLASSES,
    )
    drawn_positive = [labels[i] for i in positive]
    drawn_negative = [labels[i] for i in negative]
    assert all(0 <= label < NUM_CLASSES for label in drawn_positive)
    assert all(label == NUM_CLASSES for label in drawn_negative)
    drawn = positive.tolist() + negative.tolist()
    assert len(set(drawn)) == len(drawn)
    num_background = labels.count(NUM_CLASSES)
    num_foreground = len(labels) - num_background - labels.count(-1)
    assert len(positive) == min(num_foreground, int(num_samples * positive_fraction))
    assert len(negative) == min(num_background, num_samples - len(positive))


def test_every_row_can_be_drawn():
    labels = torch.tensor([0, 1, 2, 3, 3, 3, -1])
    drawn = set()
    for seed in range(50):
        torch.manual_seed(seed)
        for rows in sample_labels(
            labels, num_samples=2, positive_fraction=0.5, negative_label=NUM_CLASSES
        ):
            drawn |= set(rows.tolist())
    assert drawn == {0, 1, 2, 3, 4, 5}


def test_each_image_has_a_minibatch_of_its_own():
    scene = make_scene(num_proposals=(60, 3, 40), num_objects=(5, 1, 0), image_sizes=[(96, 96)] * 3)
    targets = make_cascade(batch_size_per_image=12, positive_fraction=0.25).targets
    sampled = targets.sample(label_scene(scene, 0.4), 3)
    assert sampled.image_index.bincount(minlength=3).tolist() == [12, 3, 12]
    for image in range(3):
        rows = sampled.image_index == image
        pool = {tuple(box) for box in scene.proposals[image].tolist()}
        assert all(tuple(box) in pool for box in sampled.boxes[rows].tolist())
        foreground = (sampled.gt_classes[rows] < NUM_CLASSES).tolist()
        assert sum(foreground) <= 3
        # Positives come first, as Detectron2 lays a minibatch out.
        assert foreground == sorted(foreground, reverse=True)
    assert (sampled.gt_classes[sampled.image_index == 0] < NUM_CLASSES).sum() == 3
    assert (sampled.gt_classes[sampled.image_index == 2] == NUM_CLASSES).all()


def test_rows_of_a_sample_stay_together():
    boxes = random_boxes(50, (96, 96), generator=torch.Generator().manual_seed(3))
    ground_truth = GroundTruth(
        boxes[:5], torch.tensor([0, 1, 2, 0, 1]), torch.zeros(5, dtype=torch.int64)
    )
    images = torch.zeros(50, dtype=torch.int64)
    labelled = label_regions(
        boxes, images, ground_truth, iou_threshold=0.5, num_classes=NUM_CLASSES
    )
    targets = make_cascade(batch_size_per_image=20, positive_fraction=0.5).targets
    sampled = targets.sample(labelled, 1)
    again = label_regions(
        sampled.boxes, sampled.image_index, ground_truth, iou_threshold=0.5, num_classes=NUM_CLASSES
    )
    assert torch.equal(sampled.gt_classes, again.gt_classes)
    assert torch.equal(sampled.gt_boxes, again.gt_boxes)
    assert torch.equal(sampled.ious, again.ious)

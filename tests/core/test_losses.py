"""Losses by hand on boxes whose overlaps can be counted."""

import math

import pytest
import torch

from cascade_det.core.losses import BOX_LOSSES, box_loss, classification_loss

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def loss_of(box, gt_box, *, deltas=(0.0, 0.0, 0.0, 0.0), loss_type="smooth_l1", beta=0.0):
    return box_loss(
        torch.tensor([deltas]),
        torch.tensor([box]),
        torch.tensor([gt_box]),
        weights=WEIGHTS,
        loss_type=loss_type,
        smooth_l1_beta=beta,
    ).item()


@pytest.mark.parametrize(
    ("beta", "wanted"),
    [
        # GroundTruth of (2, -1, 5 log 2, 0) from predictions of (0, 0, 0, 0.5).
        (0.0, 2 + 1 + 5 * math.log(2) + 0.5),
        (1.5, (2 - 0.75) + 1 / 3 + (5 * math.log(2) - 0.75) + 0.25 / 3),
    ],
)
def test_smooth_l1_compares_deltas(beta, wanted):
    loss = loss_of([0.0, 0, 10, 10], [-3.0, -1, 17, 9], deltas=(0.0, 0.0, 0.0, 0.5), beta=beta)
    assert loss == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("loss_type", "wanted"),
    [
        # Shared 1, union 7, hull 3 x 3, centres sqrt(2) apart on a diagonal of sqrt(18).
        ("giou", 1 - (1 / 7 - 2 / 9)),
        ("diou", 1 - (1 / 7 - 2 / 18)),
        ("ciou", 1 - (1 / 7 - 2 / 18)),
    ],
)
def test_iou_losses_of_shifted_squares(loss_type, wanted):
    assert loss_of([0.0, 0, 2, 2], [1.0, 1, 3, 3], loss_type=loss_type) == pytest.approx(wanted)


def test_ciou_also_compares_aspect_ratios():
    aspect = 4 / math.pi**2 * (math.atan(1) - math.atan(2)) ** 2
    wanted = 0.5 + 1 / 20 + aspect * aspect / (0.5 + aspect)
    assert loss_of([0.0, 0, 4, 2], [0.0, 0, 2, 2], loss_type="ciou") == pytest.approx(wanted)
    assert loss_of([0.0, 0, 4, 2], [0.0, 0, 2, 2], loss_type="diou") == pytest.approx(0.55)


@pytest.mark.parametrize("loss_type", ["giou", "diou", "ciou"])
def test_iou_losses_look_at_the_moved_box(loss_type):
    deltas = (10.0 * 0.5, 10.0 * 0.5, 0.0, 0.0)
    moved = loss_of([0.0, 0, 2, 2], [1.0, 1, 3, 3], deltas=deltas, loss_type=loss_type)
    assert moved == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss_type", BOX_LOSSES)
def test_box_losses_are_summed_and_zero_without_boxes(loss_type):
    boxes = torch.tensor([[0.0, 0, 2, 2], [5, 5, 9, 12]])
    gt_boxes = torch.tensor([[1.0, 1, 3, 3], [4, 6, 9, 10]])
    deltas = torch.randn(2, 4, requires_grad=True)
    arguments = {"weights": WEIGHTS, "loss_type": loss_type, "smooth_l1_beta": 0.1}
    both = box_loss(deltas, boxes, gt_boxes, **arguments)
    each = [
        box_loss(deltas[i : i + 1], boxes[i : i + 1], gt_boxes[i : i + 1], **arguments)
        for i in (0, 1)
    ]
    torch.testing.assert_close(both, each[0] + each[1])
    none = box_loss(deltas[:0], boxes[:0], gt_boxes[:0], **arguments)
    none.backward()
    assert none.item() == 0
    assert torch.equal(deltas.grad, torch.zeros(2, 4))


def test_unknown_box_loss_is_named():
    with pytest.raises(ValueError, match=r"'l3'.*smooth_l1, giou, diou, ciou"):
        loss_of([0.0, 0, 2, 2], [1.0, 1, 3, 3], loss_type="l3")


def test_classification_is_the_mean_of_negative_log_probabilities():
    logits = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0], [0.0, 0.0]])
    wanted = -(math.log(1 / 4) + math.log(4 / 5) + math.log(1 / 2)) / 3
    loss = classification_loss(logits, torch.tensor([0, 0, 1]))
    assert loss.item() == pytest.approx(wanted)


def test_classification_without_regions_is_zero_with_gradients():
    logits = torch.zeros(0, 4, requires_grad=True)
    loss = classification_loss(logits, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.shape == (0, 4)


def test_classification_is_float32_for_half_precision_logits():
    logits = torch.randn(5, 4).bfloat16()
    labels = torch.tensor([0, 1, 2, 3, 0])
    loss = classification_loss(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, classification_loss(logits.float(), labels))

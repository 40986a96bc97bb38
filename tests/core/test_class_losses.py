"""Class losses against naive ones, torchvision, and the formulas of the papers."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_cascades import NUM_CLASSES, make_cascade, make_scene
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss
from training_passes import losses_of, make_pass, random_passes

from cascade_det.core.class_losses import ClassLoss, focal_loss, seesaw_loss
from cascade_det.core.region_gates import RegionGates
from cascade_det.core.training_schedule import TrainingSchedule

seeds = st.integers(0, 10**6)


def random_case(seed, classes=4, regions=9):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(regions, classes + 1, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes + 1, (regions,), generator=generator)
    counts = torch.randint(0, 50, (classes,), generator=generator)
    return logits.requires_grad_(), labels, counts


def naive_seesaw(logits, labels, counts, p, q):
    """Region by region, class by class, as the paper writes it; S are plain numbers."""
    losses = []
    num_classes = logits.shape[1] - 1
    for z, label in zip(logits, labels.tolist(), strict=True):
        objectness = torch.sigmoid(torch.logsumexp(z[:-1], 0) - z[-1])
        if label == num_classes:
            losses.append(-torch.log(1 - objectness))
            continue
        scores = torch.softmax(z[:-1], 0).tolist()
        denominator = torch.exp(z[label])
        for other in range(num_classes):
            if other == label:
                continue
            own, theirs = max(int(counts[label]), 1), max(int(counts[other]), 1)
            mitigation = (theirs / own) ** p if own > theirs else 1.0
            ratio = scores[other] / scores[label]
            compensation = ratio**q if ratio > 1 else 1.0
            denominator = denominator + mitigation * compensation * torch.exp(z[other])
        losses.append(-torch.log(objectness) - torch.log(torch.exp(z[label]) / denominator))
    return torch.stack(losses)


def assert_same_with_gradients(ours, theirs, logits):
    weights = torch.linspace(0.5, 2, len(ours), dtype=torch.float64)
    grads = [torch.autograd.grad((weights * loss).sum(), logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*grads)


@given(seed=seeds, p=st.floats(0, 2), q=st.floats(0, 3))
def test_seesaw_is_the_papers(seed, p, q):
    logits, labels, counts = random_case(seed)
    ours = seesaw_loss(logits, labels, counts, p=p, q=q)
    assert_same_with_gradients(ours, naive_seesaw(logits, labels, counts, p, q), logits)


def test_seesaw_by_hand():
    """Two classes with equal logits, 100 and 1 regions: the rare one is spared by 0.01^p."""
    logits = torch.tensor([[0.0, 0, -50], [0, 0, -50], [1, 0, -50]])
    labels, counts = torch.tensor([0, 1, 1]), torch.tensor([100, 1])
    losses = seesaw_loss(logits, labels, counts, p=0.5, q=2.0)
    wanted = [
        math.log(1 + 0.1),  # M = 0.01^0.5
        math.log(2),  # the frequent class presses on the rare one as before
        math.log(1 + math.exp(2) * math.e),  # C = (e / 1)^2
    ]
    torch.testing.assert_close(losses, torch.tensor(wanted))


@given(seed=seeds, gamma=st.floats(0, 5))
def test_focal_loss_is_the_papers(seed, gamma):
    logits, labels, _ = random_case(seed)
    probs = torch.softmax(logits, dim=1)[range(len(labels)), labels]
    theirs = -((1 - probs) ** gamma) * torch.log(probs)
    assert_same_with_gradients(focal_loss(logits, labels, gamma), theirs, logits)


@given(seed=seeds, alpha=st.floats(0.1, 0.9))
def test_of_one_class_focal_loss_is_torchvisions(seed, alpha):
    """The softmax of (z, 0) is the sigmoid of z; alpha is the weight of the class."""
    logits, labels, _ = random_case(seed, classes=1)
    loss = ClassLoss(
        "focal", num_stages=1, num_classes=1, class_weights=(alpha, 1 - alpha)
    ).double()
    z = logits[:, 0] - logits[:, 1]
    theirs = sigmoid_focal_loss(z, (labels == 0).double(), alpha=alpha, gamma=2.0)
    ours = focal_loss(logits, labels, 2.0) * loss.weights[labels].double()
    assert_same_with_gradients(ours, theirs, logits)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_a_certain_region_has_no_loss_and_no_gradient(gamma):
    logits = torch.tensor([[200.0, 0, 0]], requires_grad=True)
    focal_loss(logits, torch.tensor([0]), gamma).sum().backward()
    assert logits.grad.tolist() == [[0, 0, 0]]


NEUTRAL = {
    "focal": {"focal_gamma": 0.0},
    "seesaw": {"seesaw_p": 0.0, "seesaw_q": 0.0},
    "cross_entropy": {"class_weights": (1.0,) * (NUM_CLASSES + 1)},
}


def class_loss(kind, **arguments):
    return ClassLoss(kind, num_stages=3, num_classes=NUM_CLASSES, **arguments)


@pytest.mark.parametrize("kind", NEUTRAL)
@pytest.mark.parametrize("gated", [False, True])
def test_neutral_exponents_and_weights_are_the_cross_entropy(kind, gated):
    gates = RegionGates("soft", threshold=0.5, scale=3) if gated else None
    cascades = [
        make_cascade(
            stage_loss_weights=(1.0, 0.5, 0.25),
            regime=TrainingSchedule(num_stages=3, class_loss=loss, gates=gates),
        )
        for loss in (class_loss(kind, **NEUTRAL[kind]), None)
    ]
    losses = [losses_of(cascade, make_scene()) for cascade in cascades]
    torch.testing.assert_close(*losses)
    for values in losses:
        sum(values.values()).backward()
    torch.testing.assert_close(
        *([p.grad for p in cascade.parameters()] for cascade in cascades), rtol=1e-4, atol=1e-6
    )


def test_weights_are_of_the_label_and_the_mean_is_over_regions():
    weights = (0.5, 3.0, 0.0, 0.1)
    passes = random_passes()
    schedule = TrainingSchedule(
        num_stages=3, class_loss=class_loss("cross_entropy", class_weights=weights)
    )
    targets = [make_cascade(stage_loss_weights=(1.0, 0.5, 2.0)).targets] * 3
    losses, _ = schedule.stage_losses(passes, targets)
    for stage, (output, factor) in enumerate(zip(passes, (1.0, 0.5, 2.0), strict=True)):
        terms = [
            weights[label] * F.cross_entropy(z, torch.tensor(label)).item()
            for z, label in zip(output.logits, output.regions.gt_classes.tolist(), strict=True)
        ]
        wanted = factor * sum(terms) / len(terms)
        assert losses[f"loss_cls_stage{stage}"].item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", ["focal", "seesaw"])
def test_validation_has_the_plain_losses_and_counts_nothing(kind):
    regime = TrainingSchedule(num_stages=3, class_loss=class_loss(kind))
    cascade, scene = make_cascade(regime=regime), make_scene()
    state = copy.deepcopy(cascade.state_dict())
    assert losses_of(cascade.eval(), scene) == losses_of(make_cascade().eval(), scene)
    torch.testing.assert_close(dict(cascade.state_dict()), dict(state), rtol=0, atol=0)


def test_counts_are_of_the_labels_of_each_stage_and_are_saved():
    loss = class_loss("seesaw")
    for seed in (0, 1):
        loss(random_passes(seed))
    counted = torch.zeros(3, NUM_CLASSES, dtype=torch.int64)
    for seed in (0, 1):
        for stage, output in enumerate(random_passes(seed)):
            for label in output.regions.gt_classes.tolist():
                if label < NUM_CLASSES:
                    counted[stage, label] += 1
    assert loss.state_dict().keys() == {"counts"}
    assert torch.equal(loss.counts, counted)
    other = class_loss("seesaw")
    other.load_state_dict(loss.state_dict())
    for one, two in zip(loss(random_passes(2)), other(random_passes(2)), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("kind", ["focal", "seesaw"])
def test_without_regions_there_is_no_loss(kind):
    logits = torch.zeros(0, NUM_CLASSES + 1, requires_grad=True)
    empty = make_pass([], logits, [])
    schedule = TrainingSchedule(num_stages=3, class_loss=class_loss(kind))
    losses, _ = schedule.stage_losses([empty] * 3, [make_cascade().targets] * 3)
    total = sum(losses[f"loss_cls_stage{stage}"] for stage in range(3))
    total.backward()
    assert total == 0


def test_wrong_arguments():
    with pytest.raises(ValueError, match="unknown class loss 'dice'"):
        class_loss("dice")
    with pytest.raises(ValueError, match="2 class_weights for 3 classes"):
        class_loss("focal", class_weights=(1.0, 1.0))

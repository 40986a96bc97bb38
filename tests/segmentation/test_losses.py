"""Losses of subsets of levels: official numbers, a naive implementation, and laws."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_near, description, vectors
from torch.testing import assert_close

from cascade_det.segmentation.losses import SubsetLoss, dice_loss


def naive_dice(logits, labels, ignore=255):
    """Class by class, over the pixels that are left when the ignored ones are cut out."""
    kept = labels != ignore
    p = logits.softmax(1).movedim(1, -1)[kept]  # [P, K]
    terms = []
    for k in range(logits.shape[1]):
        y = (labels[kept] == k).to(p.dtype)
        overlap = 2 * (p[:, k] * y).sum() + 1e-5
        terms.append(1 - overlap / (p[:, k].pow(2).sum() + y.pow(2).sum() + 1e-5))
    return torch.stack(terms).mean()


def naive_loss(maps, labels, subsets, ce_weight, dice_weight, ignore=255):
    sizes = range(1, len(maps) + 1) if subsets == "mutation" else [1]
    terms = []
    for size in sizes:
        for subset in combinations(maps, size):
            summed = torch.stack(subset).sum(0)
            ce = F.cross_entropy(summed, labels, ignore_index=ignore)
            terms.append(ce_weight * ce + dice_weight * naive_dice(summed, labels, ignore))
    return torch.stack(terms).sum()


def gradients(loss, maps):
    return torch.autograd.grad(loss, maps)


def random_case(seed, levels, *, n=2, k=3, size=(4, 5), ignored=0.2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    maps = [
        (2 * torch.randn(n, k, *size, generator=generator, dtype=dtype)).requires_grad_()
        for _ in range(levels)
    ]
    labels = torch.randint(0, k, (n, *size), generator=generator)
    labels[torch.rand(n, *size, generator=generator) < ignored] = 255
    labels[0, 0, 0] = 0  # at least one that counts
    return maps, labels


def official_maps(tensors):
    return [tensors[f"logits.{i}"].requires_grad_() for i in range(4)]


def test_mutation_has_the_official_loss_and_gradients():
    tensors = vectors("mutation_loss")
    maps = official_maps(tensors)
    loss = SubsetLoss()(maps, tensors["labels"])
    assert_close(loss, tensors["loss"][0], rtol=1e-6, atol=0)
    for i, gradient in enumerate(gradients(loss, maps)):
        assert_near(gradient, tensors[f"grad.logits.{i}"], 5e-5)


def test_singletons_have_the_official_loss():
    tensors, expected = vectors("mutation_loss"), description("mutation_loss")
    loss = SubsetLoss("singletons")(official_maps(tensors), tensors["labels"])
    assert loss.item() == pytest.approx(expected["deep_supervision_loss_4_singletons"], rel=1e-6)


def test_each_subset_has_the_official_terms():
    tensors, terms = vectors("mutation_loss"), description("mutation_loss")["terms"]
    assert len(terms) == 15
    for term in terms:
        summed = sum(tensors[f"logits.{i}"] for i in term["subset"])
        labels = tensors["labels"]
        ce = SubsetLoss("singletons", ce_weight=1, dice_weight=0)([summed], labels)
        assert ce.item() == pytest.approx(term["ce"], rel=1e-6)
        assert dice_loss(summed, labels).item() == pytest.approx(term["dice"], rel=1e-6)


def test_dice_has_the_official_numbers():
    tensors = vectors("dice_loss")
    logits = tensors["logits"].requires_grad_()
    loss = dice_loss(logits, tensors["labels"])
    assert_close(loss, tensors["loss"][0], rtol=1e-6, atol=0)
    assert_near(gradients(loss, [logits])[0], tensors["grad.logits"], 5e-5)
    alone = dice_loss(logits, tensors["labels_all_background"])
    assert_close(alone, tensors["loss_all_background"][0], rtol=1e-6, atol=0)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    levels=st.integers(1, 5),
    k=st.integers(1, 5),
    ignored=st.sampled_from([0.0, 0.3, 0.9]),
    subsets=st.sampled_from(["mutation", "singletons"]),
    weights=st.sampled_from([(0.3, 0.7), (1.0, 0.0), (0.0, 1.0)]),
)
def test_loss_and_gradients_are_those_of_the_naive_sum(seed, levels, k, ignored, subsets, weights):
    maps, labels = random_case(seed, levels, k=k, ignored=ignored)
    expected = naive_loss(maps, labels, subsets, *weights)
    loss = SubsetLoss(subsets, ce_weight=weights[0], dice_weight=weights[1])(maps, labels)
    assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    assert_close(gradients(loss, maps), gradients(expected, maps), rtol=1e-8, atol=1e-12)


def test_singletons_are_deep_supervision():
    maps, labels = random_case(1, 4)
    loss = SubsetLoss("singletons")(maps, labels)
    alone = [SubsetLoss("mutation")([one], labels) for one in maps]
    assert_close(loss, sum(alone))


@pytest.mark.parametrize(("levels", "scale"), [(1, 1.0), (2, 2 / 3), (4, 4 / 15)])
def test_the_mean_has_the_scale_of_deep_supervision(levels, scale):
    maps, labels = random_case(2, levels)
    for name, expected in (("mutation", scale), ("singletons", 1.0)):
        loss = SubsetLoss(name, mean=True)(maps, labels)
        plain = SubsetLoss(name)(maps, labels)
        assert_close(loss, expected * plain)
        assert_close(gradients(loss, maps), tuple(expected * g for g in gradients(plain, maps)))
    # Terms that are all equal: MUTATION is then as large as deep supervision.
    zeros = [torch.zeros_like(level) for level in maps]
    both = [SubsetLoss(name, mean=True)(zeros, labels) for name in ("mutation", "singletons")]
    assert_close(*both)


def test_a_step_multiplies_the_gradient():
    maps, labels = random_case(3, 3)
    loss = SubsetLoss()(maps, labels)
    expected = gradients(3 * naive_loss(maps, labels, "mutation", 0.3, 0.7), maps)
    assert_close(gradients(3 * loss, maps), expected)


def test_the_ignore_value_can_be_chosen():
    maps, labels = random_case(4, 2)
    loss = SubsetLoss()(maps, labels)
    labels[labels == 255] = -1
    assert_close(SubsetLoss(ignore_value=-1)(maps, labels), loss)
    assert_close(dice_loss(maps[0], labels, ignore_value=-1), naive_dice(maps[0], labels, -1))


def test_nothing_to_learn_from_gives_zero():
    maps, labels = random_case(5, 3)
    labels.fill_(255)
    loss = SubsetLoss()(maps, labels)
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(loss, maps))
    assert dice_loss(maps[0], labels).item() == 0


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_extreme_logits_are_finite(size):
    maps, labels = random_case(6, 4, dtype=torch.float32)
    maps = [(level.detach() * size).requires_grad_() for level in maps]
    loss = SubsetLoss()(maps, labels)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(loss, maps))


def test_a_perfect_prediction_costs_nothing():
    _, labels = random_case(7, 1, ignored=0)
    logits = 100 * F.one_hot(labels, 3).movedim(-1, 1).float()
    assert SubsetLoss()([logits, logits], labels).item() == pytest.approx(0, abs=1e-6)


def test_an_absent_class_counts_in_dice():
    """Its smoothing makes it 1 - 1e-5 / (sum of p^2 + 1e-5)."""
    logits, labels = torch.zeros(1, 2, 1, 2, dtype=torch.float64), torch.zeros(1, 1, 2).long()
    # p = 1/2 everywhere. Class 0: 1 - (2 + 1e-5) / (0.5 + 2 + 1e-5); class 1: no truth.
    expected = ((1 - (2 + 1e-5) / (2.5 + 1e-5)) + (1 - 1e-5 / (0.5 + 1e-5))) / 2
    assert dice_loss(logits, labels).item() == pytest.approx(expected, rel=1e-12)


def test_only_wanted_gradients_and_none_without():
    maps, labels = random_case(8, 2)
    frozen = maps[1].detach()
    loss = SubsetLoss()([maps[0], frozen], labels)
    expected = gradients(naive_loss(maps, labels, "mutation", 0.3, 0.7), maps)[0]
    assert_close(gradients(loss, maps[:1])[0], expected)
    with torch.no_grad():
        assert not SubsetLoss()(maps, labels).requires_grad


def test_half_precision_is_computed_in_single():
    maps, labels = random_case(9, 3, dtype=torch.bfloat16)
    wide = [level.detach().float().requires_grad_() for level in maps]
    loss, expected = SubsetLoss()(maps, labels), SubsetLoss()(wide, labels)
    assert loss.dtype == torch.float32
    assert_close(loss, expected)
    found = gradients(loss, maps)
    assert found[0].dtype == torch.bfloat16
    assert_close(found, tuple(g.bfloat16() for g in gradients(expected, wide)))


def test_inputs_are_not_changed():
    maps, labels = random_case(10, 3)
    before = [level.detach().clone() for level in maps], labels.clone()
    SubsetLoss()(maps, labels).backward()
    assert_close(([level.detach() for level in maps], labels), before, rtol=0, atol=0)


def test_bad_arguments_are_named():
    maps, labels = random_case(11, 2)
    with pytest.raises(ValueError, match="unknown subsets 'pairs'; known: mutation, singletons"):
        SubsetLoss("pairs")
    with pytest.raises(ValueError, match="one level or more"):
        SubsetLoss()([], labels)
    for wrong in (maps[1][:, :2], maps[1][:, :, :3], maps[1][:1]):
        with pytest.raises(ValueError, match="do not fit labels"):
            SubsetLoss()([maps[0], wrong], labels)

"""Every-prefix training against a loop over subsets."""

from itertools import chain, combinations

import pytest
import torch
from small_cascades import make_cascade, make_scene
from torch.nn import functional as F
from training_passes import losses_of, random_passes

from cascade_det.core.ensemble import ScoreEnsemble
from cascade_det.core.prefix_loss import prefix_loss
from cascade_det.core.training_schedule import TrainingSchedule


def naive_prefix_loss(passes, name):
    stages = range(len(passes))
    subsets = chain.from_iterable(combinations(stages, n) for n in range(1, len(passes) + 1))
    losses = []
    for subset in subsets:
        deepest = passes[max(subset)]
        terms = []
        for place, row in enumerate(deepest.proposal_index.tolist()):
            of_region = [
                output.logits[output.proposal_index.tolist().index(row)]
                for output in (passes[s] for s in subset)
            ]
            if name == "mean_logits":
                probs = torch.softmax(sum(of_region) / len(subset), dim=0)
            else:
                probs = sum(torch.softmax(x, dim=0) for x in of_region) / len(subset)
            label = deepest.regions.gt_classes[place]
            terms.append(F.nll_loss(probs.log()[None], label[None]))
        losses.append(sum(terms) / len(terms))
    assert len(losses) == 2 ** len(passes) - 1
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", ["mean_probs", "mean_logits"])
@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_loss_and_gradients_equal_a_loop_over_subsets(name, num_stages):
    passes = random_passes()[:num_stages]
    logits = [output.logits.requires_grad_() for output in passes]
    results = []
    for loss in (prefix_loss(passes, ScoreEnsemble(name)), naive_prefix_loss(passes, name)):
        results.append((loss, torch.autograd.grad(loss, logits)))
    torch.testing.assert_close(*results)
    assert all(gradient.any() for gradient in results[0][1])


@pytest.mark.parametrize("name", ["mean_probs", "mean_logits"])
def test_the_ensemble_is_that_of_inference(name):
    ensemble, logits = ScoreEnsemble(name), [torch.randn(5, 4) for _ in range(3)]
    total = None
    for stage in range(3):
        total = ensemble.update(total, logits[stage])
        probs = ensemble.log_probs(logits[: stage + 1]).exp()
        torch.testing.assert_close(probs, ensemble.probs(total, stage + 1))


def test_probabilities_that_round_to_zero_have_a_finite_loss():
    logits = torch.tensor([[0.0, 300.0]])
    assert ScoreEnsemble("mean_probs").log_probs([logits, logits])[0, 0] == -300


@pytest.mark.parametrize("name", ["last", "last_boxes"])
def test_other_ensembles_are_refused(name):
    with pytest.raises(ValueError, match=name):
        ScoreEnsemble(name).log_probs([torch.zeros(1, 2)])


def test_it_comes_beside_the_plain_losses():
    scene = make_scene()
    regime = TrainingSchedule(num_stages=3, prefix_loss_weight=0.5)
    cascade, plain = make_cascade(regime=regime), make_cascade()
    losses, wanted = losses_of(cascade, scene), losses_of(plain, scene)
    prefix = losses.pop("loss_prefix")
    assert losses.keys() == wanted.keys()
    assert all(torch.equal(losses[name], wanted[name]) for name in wanted)
    double = make_cascade(regime=TrainingSchedule(num_stages=3, prefix_loss_weight=1.0))
    torch.testing.assert_close(losses_of(double, scene)["loss_prefix"], 2 * prefix)
    parameters = dict(cascade.named_parameters())
    gradients = torch.autograd.grad(prefix, list(parameters.values()), allow_unused=True)
    unused = {n for n, g in zip(parameters, gradients, strict=True) if g is None}
    assert unused == {n for n in parameters if "bbox_pred" in n}

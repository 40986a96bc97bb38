"""Confidence-gated training: the weights of regions against loops, and what they do to losses."""

import math

import pytest
import torch
from small_cascades import NUM_CLASSES, make_cascade, make_scene
from training_passes import losses_of, make_pass, random_passes

from cascade_det.core.region_gates import RegionGates
from cascade_det.core.training_schedule import TrainingSchedule

STAGE_WEIGHTS = (1.0, 0.7, 0.2)


def settled(kind, probs, label, threshold, scale):
    if kind == "hard":
        best = max(range(len(probs)), key=probs.__getitem__)
        return float(probs[best] >= threshold and best == label)
    return 1 / (1 + math.exp(-scale * (probs[label] - threshold)))


def naive_weights(stages, kind, threshold, scale):
    """By a loop over regions: (stage, row) to weight, and to eligibility."""
    weights, eligibility = {}, {}
    for row in stages[0].proposal_index.tolist():
        left, own = 1.0, {}
        for stage, output in enumerate(stages):
            if row not in output.proposal_index.tolist():
                continue
            place = output.proposal_index.tolist().index(row)
            logits = output.logits[place].tolist()
            exps = [math.exp(x) for x in logits]
            probs = [x / sum(exps) for x in exps]
            own[stage] = STAGE_WEIGHTS[stage] * left + 1e-3
            eligibility[stage, row] = left
            label = output.regions.gt_classes[place].item()
            left *= 1 - settled(kind, probs, label, threshold, scale)
        weights |= {(stage, row): w / sum(own.values()) for stage, w in own.items()}
    return weights, eligibility


@pytest.mark.parametrize(("kind", "threshold", "scale"), [("hard", 0.7, 0), ("soft", 0.8, 15)])
def test_weights_equal_a_loop_over_regions(kind, threshold, scale):
    stages = random_passes()
    gates = RegionGates(kind, threshold=threshold, scale=scale)
    weights, eligible = gates.weights(stages, STAGE_WEIGHTS)
    wanted, eligibility = naive_weights(stages, kind, threshold, scale)
    got = {}
    for stage, output in enumerate(stages):
        for place, row in enumerate(output.proposal_index.tolist()):
            got[stage, row] = weights[stage][place].item()
            assert eligible[stage][place].item() == pytest.approx(eligibility[stage, row], abs=1e-5)
    assert got == pytest.approx(wanted, abs=1e-5)
    # Some regions are settled by the first stage, some go to the last, some did not get there.
    last = [got[2, row] for row in stages[2].proposal_index.tolist()]
    assert min(last) < 0.01 < 0.1 < max(last)
    assert len(stages[2].proposal_index) < 40
    totals = torch.zeros(40)
    for output, weight in zip(stages, weights, strict=True):
        totals[output.proposal_index] += weight
    torch.testing.assert_close(totals, torch.ones(40))


def test_who_is_confident_and_wrong_goes_on():
    sure = [[9.0, 0, 0, 0]] * 2 + [[1.0, 0, 0, 0]]
    stages = [make_pass([0, 1, 2], sure, [0, 1, 0]) for _ in range(2)]
    _, eligible = RegionGates("hard", threshold=0.9, scale=0).weights(stages, (1.0, 1.0))
    assert eligible[0].tolist() == [1, 1, 1]
    assert eligible[1].tolist() == [0, 1, 1]


def test_background_counts_as_correct():
    stages = [make_pass([0], [[0.0, 0, 0, 9]], [NUM_CLASSES]) for _ in range(2)]
    _, eligible = RegionGates("hard", threshold=0.9, scale=0).weights(stages, (1.0, 1.0))
    assert eligible[1].tolist() == [0]


def gated(gates, **changes):
    return make_cascade(regime=TrainingSchedule(num_stages=3, gates=gates, **changes))


def test_gates_that_never_close_are_plain_training():
    scene = make_scene()
    plain = losses_of(make_cascade(stage_loss_weights=STAGE_WEIGHTS), scene)
    gates = RegionGates("soft", threshold=1.0, scale=1e4)
    regime = TrainingSchedule(num_stages=3, gates=gates)
    losses = losses_of(make_cascade(stage_loss_weights=STAGE_WEIGHTS, regime=regime), scene)
    assert list(losses) == list(plain)
    torch.testing.assert_close(losses, plain, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_losses_are_weighted_cross_entropies(kind):
    scene, gates = make_scene(), RegionGates(kind, threshold=0.5, scale=15)
    cascade = gated(gates)
    seen = []
    weights = gates.weights

    def watch(stages, stage_weights):
        seen.append((stages, weights(stages, stage_weights)[0], stage_weights))
        return weights(stages, stage_weights)

    gates.weights = watch
    losses = losses_of(cascade, scene)
    (stages, of_regions, stage_weights) = seen[0]
    assert stage_weights == (1.0, 1.0, 1.0)
    for stage, (output, weight) in enumerate(zip(stages, of_regions, strict=True)):
        assert not weight.requires_grad
        log_probs = torch.log_softmax(output.logits, dim=1)
        terms = [
            -weight[i] * log_probs[i, label]
            for i, label in enumerate(output.regions.gt_classes.tolist())
        ]
        wanted = 3 * sum(terms) / len(stages[0].proposal_index)
        torch.testing.assert_close(losses[f"loss_cls_stage{stage}"], wanted)
        eligible = cascade.metrics[f"stage{stage}/eligible"]
        assert 0 < eligible <= 1
    plain = losses_of(make_cascade(), scene)
    for stage in range(3):
        name = f"loss_box_reg_stage{stage}"
        assert torch.equal(losses[name], plain[name])
    assert cascade.metrics["stage2/eligible"] < 1


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_stage_has_no_gradient_from_gates_of_later_losses(kind):
    cascade, scene = gated(RegionGates(kind, threshold=0.5, scale=15)), make_scene()
    losses, parameters = losses_of(cascade, scene), dict(cascade.named_parameters())
    for stage in range(3):
        gradients = torch.autograd.grad(
            losses[f"loss_cls_stage{stage}"],
            list(parameters.values()),
            retain_graph=True,
            allow_unused=True,
        )
        used = {n for n, g in zip(parameters, gradients, strict=True) if g is not None}
        assert used == {
            n for n in parameters if n.split(".")[1] == str(stage) and "bbox_pred" not in n
        }


def test_unknown_gates_are_refused():
    with pytest.raises(ValueError, match="hard, soft"):
        RegionGates("firm", threshold=0.5, scale=1)

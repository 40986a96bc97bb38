"""Training schedules: scheduled and learned stage weights, and the plain one."""

import math

import pytest
import torch
from small_cascades import make_cascade, make_scene
from training_passes import losses_of

from cascade_det.core.region_gates import RegionGates
from cascade_det.core.training_schedule import TrainingSchedule

START, END = (1.0, 0.7, 0.4), (0.2, 0.5, 0.9)


def test_the_plain_schedule_has_no_state_and_changes_nothing():
    cascade, scene = make_cascade(), make_scene()
    assert not list(cascade.regime.parameters())
    assert not [name for name in cascade.state_dict() if "regime" in name]
    cascade.regime.progress = 0.7
    rules = cascade.targets
    assert cascade.regime.current_targets(rules, 1) is rules
    assert losses_of(cascade, scene) == losses_of(make_cascade(), scene)


def scheduled(**changes):
    regime = TrainingSchedule(
        num_stages=3, stage_weighting="scheduled", stage_loss_weights_end=END, **changes
    )
    return make_cascade(stage_loss_weights=START, regime=regime)


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_weights_go_from_start_to_end(progress):
    cascade, scene = scheduled(), make_scene()
    cascade.regime.progress = progress
    losses, plain = losses_of(cascade, scene), losses_of(make_cascade(), scene)
    for stage, (start, end) in enumerate(zip(START, END, strict=True)):
        weight = (1 - progress) * start + progress * end
        for name in (f"loss_cls_stage{stage}", f"loss_box_reg_stage{stage}"):
            torch.testing.assert_close(losses[name], weight * plain[name])


def test_gates_use_the_current_weights():
    cascade = scheduled(gates=RegionGates("hard", threshold=0.5, scale=1))
    seen = []
    weights = cascade.regime.gates.weights
    cascade.regime.gates.weights = lambda p, w: seen.append(w) or weights(p, w)
    cascade.regime.progress = 1.0
    losses_of(cascade, make_scene())
    assert seen == [pytest.approx(END)]


def learned():
    return make_cascade(regime=TrainingSchedule(num_stages=3, stage_weighting="learned"))


def test_learned_weights_begin_as_plain_training():
    scene = make_scene()
    losses = losses_of(learned(), scene)
    assert losses.pop("loss_stage_weights") == 0
    assert losses == losses_of(make_cascade(), scene)


def test_learned_weights_are_exp_of_minus_s_with_the_penalty_s():
    cascade, scene = learned(), make_scene()
    values = (0.5, -1.0, 0.1)
    cascade.regime.log_variances.data = torch.tensor(values)
    losses, plain = losses_of(cascade, scene), losses_of(make_cascade(), scene)
    assert losses["loss_stage_weights"].item() == pytest.approx(sum(values))
    (gradient,) = torch.autograd.grad(
        sum(losses.values()), [cascade.regime.log_variances], retain_graph=True
    )
    for stage, s in enumerate(values):
        pair = [plain[f"{name}_stage{stage}"] for name in ("loss_cls", "loss_box_reg")]
        for name, loss in zip(("loss_cls", "loss_box_reg"), pair, strict=True):
            torch.testing.assert_close(losses[f"{name}_stage{stage}"], math.exp(-s) * loss)
        # d/ds of exp(-s) L + s
        wanted = 1 - math.exp(-s) * sum(pair).item()
        assert gradient[stage].item() == pytest.approx(wanted, rel=1e-4)
        factor = cascade.metrics[f"stage{stage}/loss_factor"]
        assert factor.item() == pytest.approx(math.exp(-s))
    assert [name for name in cascade.state_dict() if "regime" in name] == ["regime.log_variances"]


def test_in_evaluation_losses_are_plain():
    scene, wanted = make_scene(), None
    for cascade in (
        make_cascade(stage_loss_weights=START),
        scheduled(gates=RegionGates("soft", threshold=0.5, scale=15), prefix_loss_weight=1.0),
        make_cascade(
            stage_loss_weights=START,
            regime=TrainingSchedule(num_stages=3, stage_weighting="learned"),
        ),
    ):
        cascade.regime.progress = 0.5
        losses = losses_of(cascade.eval(), scene)
        wanted = wanted or losses
        assert losses == wanted
        assert "stage0/eligible" not in cascade.metrics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage_weighting": "random"}, "fixed, scheduled, learned"),
        ({"stage_weighting": "scheduled", "stage_loss_weights_end": (1.0,)}, "needs 3"),
        ({"stage_loss_weights_end": (1.0, 1.0, 1.0)}, "needs 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainingSchedule(num_stages=3, **arguments)

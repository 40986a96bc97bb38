import math
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cascade_det.backbones.relative_bias import RelativeBias
from cascade_det.engine.solver import build_gradient_clipper, build_optimizer, build_scheduler
from cascade_det.engine.training_state import load_optimizer_state, optimizer_state


class Model(nn.Module):
    """Norms, biases, a frozen part, and a weight that is there twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.bn = nn.BatchNorm2d(2)
        self.gn = nn.GroupNorm(1, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.fc = nn.Linear(2, 3)
        self.tied = nn.Linear(2, 3, bias=False)
        self.tied.weight = self.fc.weight
        self.norms = nn.ModuleList([nn.LayerNorm(2), nn.InstanceNorm2d(2, affine=True)])


def named_groups(model, optimizer):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        (group["lr"], group["weight_decay"], [names[p] for p in group["params"]])
        for group in optimizer.param_groups
    ]


def test_groups_by_hand():
    model = Model()
    optimizer = build_optimizer(
        model,
        base_lr=0.1,
        weight_decay=0.01,
        weight_decay_norm=0.0,
        bias_lr_factor=2.0,
        weight_decay_bias=0.5,
    )
    biases = [f"{m}.bias" for m in ("conv", "bn", "gn", "fc", "norms.0", "norms.1")]
    assert named_groups(model, optimizer) == [
        (0.1, 0.01, ["conv.weight", "fc.weight"]),
        (0.2, 0.5, biases),
        (0.1, 0.0, ["bn.weight", "gn.weight", "norms.0.weight", "norms.1.weight"]),
    ]


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("weight_decay_norm", [0.05, None])
def test_attention_biases_alone_are_not_decayed(name, weight_decay_norm):
    """As EfficientViT's detectors are trained: norms and biases are decayed."""
    model = nn.ModuleDict({"rest": Model(), "attention": RelativeBias(2, 3, signed=False)})
    before = {name: parameter.detach().fill_(1.0) for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(
        model,
        name=name,
        base_lr=0.5,
        momentum=0.0,
        weight_decay=0.05,
        weight_decay_norm=weight_decay_norm,
        bias_lr_factor=2.0,
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    factors = {"attention.attention_biases": 1.0}
    for name in before.keys() - factors:
        frozen, is_bias = ".frozen." in name, name.endswith("bias")
        factors[name] = 1.0 if frozen else 1 - 0.5 * 0.05 * (1 + is_bias)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, factors[name]))


@pytest.mark.needs_detectron2
@pytest.mark.parametrize("weight_decay_norm", [0.0, 1e-4, None])
@pytest.mark.parametrize("bias_lr_factor", [1.0, 2.0])
@pytest.mark.parametrize("weight_decay_bias", [None, 0.0, 1e-4])
def test_groups_equal_detectron2s(weight_decay_norm, bias_lr_factor, weight_decay_bias):
    solver = pytest.importorskip("detectron2.solver.build")
    model = Model()
    expected = solver.get_default_optimizer_params(
        model,
        base_lr=0.02,
        weight_decay_norm=weight_decay_norm,
        bias_lr_factor=bias_lr_factor,
        weight_decay_bias=weight_decay_bias,
    )
    expected = torch.optim.SGD(expected, lr=0.02, momentum=0.9, weight_decay=3e-4)
    found = build_optimizer(
        model,
        base_lr=0.02,
        weight_decay=3e-4,
        weight_decay_norm=weight_decay_norm,
        bias_lr_factor=bias_lr_factor,
        weight_decay_bias=weight_decay_bias,
    )
    assert named_groups(model, found) == named_groups(model, expected)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_updates_by_the_formula(nesterov):
    model = nn.Linear(1, 1, bias=False)
    weight = model.weight.item()
    optimizer = build_optimizer(
        model, base_lr=0.1, momentum=0.5, nesterov=nesterov, weight_decay=0.2
    )
    velocity = 0.0
    for gradient in (1.0, -2.0, 3.0):
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.step()
        decayed = gradient + 0.2 * weight
        velocity = 0.5 * velocity + decayed if velocity else decayed
        weight -= 0.1 * (decayed + 0.5 * velocity if nesterov else velocity)
        assert model.weight.item() == pytest.approx(weight, rel=1e-5)


def test_adamw_decays_weights_apart_from_the_gradient():
    model = nn.Linear(1, 1, bias=False)
    weight = model.weight.item()
    optimizer = build_optimizer(model, name="AdamW", base_lr=0.1, weight_decay=0.5)
    model.weight.grad = torch.full_like(model.weight, 7.0)
    optimizer.step()
    # The first step of Adam is lr times the sign; the decay is lr * weight_decay * weight.
    assert model.weight.item() == pytest.approx(weight * (1 - 0.05) - 0.1, rel=1e-5)


@pytest.mark.parametrize(("name", "kind"), [("SGD", torch.optim.SGD), ("AdamW", torch.optim.AdamW)])
def test_it_goes_on_from_the_memory_of_pytorchs_plain_optimiser(name, kind):
    """As from a checkpoint that was written with another implementation."""
    models = [nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    settings = {"lr": 0.1, "weight_decay": 0.2, **({"momentum": 0.9} if name == "SGD" else {})}
    plain = kind(models[0].parameters(), **settings, foreach=False, fused=False)
    ours = build_optimizer(models[1], name=name, base_lr=0.1, weight_decay=0.2)

    def step(model, optimizer, number):
        for parameter in model.parameters():
            ramp = torch.linspace(-1, 2, parameter.numel()) * number
            parameter.grad = ramp.view(parameter.shape)
        optimizer.step()

    for number in (1, -2, 3):
        step(models[0], plain, number)
    models[1].load_state_dict(models[0].state_dict())
    load_optimizer_state(ours, models[1], deepcopy(optimizer_state(plain, models[0])))
    for number in (2, -1):
        step(models[0], plain, number)
        step(models[1], ours, number)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_in_another_memory_format():
    conv = nn.Conv2d(4, 6, 3, bias=False)
    before = conv.weight.detach().clone()
    optimizer = build_optimizer(conv, base_lr=0.5, momentum=0.0, weight_decay=0.0)
    x = torch.randn(2, 4, 6, 5).contiguous(memory_format=torch.channels_last)
    conv(x).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(conv.weight.detach(), before - 0.5 * conv.weight.grad)


def test_clipping_by_value():
    model = nn.Linear(2, 2)
    model.weight.grad = torch.tensor([[5.0, -0.5], [-5.0, 1.0]])
    build_gradient_clipper({"type": "value", "value": 1.0, "norm_type": 2.0})(model.parameters())
    assert model.weight.grad.tolist() == [[1.0, -0.5], [-1.0, 1.0]]


@pytest.mark.parametrize(
    ("norm_type", "weight", "bias"), [(2.0, [0.6, 0.8], [1.0]), (1.0, [3 / 7, 4 / 7], [1.0])]
)
def test_clipping_each_parameters_norm(norm_type, weight, bias):
    model = nn.Linear(2, 1)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    model.bias.grad = torch.tensor([12.0])
    clip = build_gradient_clipper({"type": "norm", "value": 1.0, "norm_type": norm_type})
    clip(model.parameters())
    torch.testing.assert_close(model.weight.grad, torch.tensor([weight]), rtol=1e-5, atol=0)
    torch.testing.assert_close(model.bias.grad, torch.tensor(bias), rtol=1e-5, atol=0)


def test_clipping_the_norm_of_all():
    model = nn.Linear(2, 1)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    model.bias.grad = torch.tensor([12.0])  # 3, 4, 12: norm 13
    build_gradient_clipper({"type": "full_model", "value": 1.3})(model.parameters())
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.3, 0.4]]), rtol=1e-5, atol=0)
    torch.testing.assert_close(model.bias.grad, torch.tensor([1.2]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["value", "norm"])
@pytest.mark.needs_detectron2
def test_clipping_equals_detectron2s(kind):
    solver = pytest.importorskip("detectron2.solver.build")
    config = pytest.importorskip("detectron2.config").get_cfg()
    config.SOLVER.CLIP_GRADIENTS.update(
        {"ENABLED": True, "CLIP_TYPE": kind, "CLIP_VALUE": 0.3, "NORM_TYPE": 2.0}
    )
    ours, theirs = nn.Linear(4, 4), nn.Linear(4, 4)
    theirs.load_state_dict(ours.state_dict())
    optimizer = solver.maybe_add_gradient_clipping(config, torch.optim.SGD(theirs.parameters(), 1))
    for model in (ours, theirs):
        torch.manual_seed(0)
        model(torch.randn(9, 4)).pow(2).sum().backward()
    optimizer.step()
    clip = build_gradient_clipper({"type": kind, "value": 0.3, "norm_type": 2.0})
    clip(ours.parameters())
    torch.optim.SGD(ours.parameters(), 1).step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_no_clipping():
    assert build_gradient_clipper(None) is None


def learning_rates(base_lrs=(1.0,), iterations=None, **arguments):
    """Of each iteration, as the trainer sees them."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in base_lrs]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    scheduler = build_scheduler(optimizer, **arguments)
    rates = []
    for _ in range(iterations or arguments["max_iter"]):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def test_multi_step_with_linear_warmup_by_hand():
    rates = learning_rates(
        (0.1, 0.2),
        name="WarmupMultiStepLR",
        max_iter=100,
        gamma=0.1,
        steps=(60, 80),
        warmup_factor=0.5,
        warmup_iters=10,
    )
    for i, found in enumerate(rates):
        factor = 0.5 + 0.5 * i / 10 if i < 10 else 0.1 ** ((i >= 60) + (i >= 80))
        assert found == pytest.approx([0.1 * factor, 0.2 * factor], rel=1e-6)


def test_cosine_by_the_formula():
    rates = learning_rates(
        name="WarmupCosineLR",
        max_iter=50,
        base_lr=2.0,
        base_lr_end=0.5,
        warmup_iters=0,
    )
    for i, (found,) in enumerate(rates):
        assert found == pytest.approx(0.25 + 0.75 * (1 + math.cos(math.pi * i / 50)) / 2)


def test_fixed_gamma_by_hand():
    rates = learning_rates(
        name="WarmupStepWithFixedGammaLR", max_iter=40, gamma=0.5, num_decays=3, warmup_iters=0
    )
    assert [r for (r,) in rates] == pytest.approx([0.5 ** (i // 10) for i in range(40)])


def test_constant_warmup_and_rescaled_interval():
    rates = learning_rates(
        name="WarmupCosineLR",
        max_iter=100,
        warmup_factor=0.1,
        warmup_iters=20,
        warmup_method="constant",
        rescale_interval=True,
    )
    for i, (found,) in enumerate(rates):
        expected = 0.1 if i < 20 else (1 + math.cos(math.pi * (i - 20) / 80)) / 2
        # At a boundary between two schedulers, fvcore gives the earlier one the benefit.
        assert found == pytest.approx(expected, abs=1e-6) or i == 20


SCHEDULES = {
    "name": st.sampled_from(["WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"]),
    "gamma": st.sampled_from([0.1, 0.5]),
    "steps": st.sets(st.integers(1, 119), max_size=3).map(lambda steps: tuple(sorted(steps))),
    "base_lr_end": st.sampled_from([0.0, 0.002]),
    "num_decays": st.integers(1, 4),
    "warmup_factor": st.sampled_from([0.0, 0.001, 0.3]),
    "warmup_iters": st.integers(0, 90),
    "warmup_method": st.sampled_from(["linear", "constant"]),
    "rescale_interval": st.booleans(),
}


@pytest.mark.needs_detectron2
@settings(max_examples=60)
@given(arguments=st.fixed_dictionaries(SCHEDULES))
def test_schedules_equal_detectron2s(arguments):
    solver = pytest.importorskip("detectron2.solver")
    config = pytest.importorskip("detectron2.config").get_cfg().SOLVER
    config.merge_from_list(["MAX_ITER", 120, "BASE_LR", 0.02])
    for name, value in arguments.items():
        key = "LR_SCHEDULER_NAME" if name == "name" else name.upper()
        config.merge_from_list([key, value])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.02)
    holder = pytest.importorskip("detectron2.config").CfgNode({"SOLVER": config})
    scheduler = solver.build_lr_scheduler(holder, optimizer)
    expected = []
    for i in range(120):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if i < 119:  # Detectron2's fixed-gamma schedule fails at the step after the last
            scheduler.step()
    found = learning_rates((0.02,), max_iter=120, base_lr=0.02, **arguments)
    assert [rate for (rate,) in found] == pytest.approx(expected, rel=1e-12, abs=0)


@settings(max_examples=60)
@given(arguments=st.fixed_dictionaries(SCHEDULES), max_iter=st.integers(1, 130))
def test_any_schedule_can_be_stepped_to_its_end(arguments, max_iter):
    arguments["warmup_iters"] *= 2  # may take all of the training
    rates = learning_rates((1.0,), max_iter=max_iter, iterations=max_iter + 1, **arguments)
    assert all(0 <= rate <= 1 + 1e-9 for (rate,) in rates)


def test_schedule_resumes():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(optimizer, max_iter=20, steps=(9, 15), warmup_iters=5)
    uninterrupted = learning_rates((1.0,), max_iter=20, steps=(9, 15), warmup_iters=5)
    for _ in range(7):
        optimizer.step()
        scheduler.step()
    states = optimizer.state_dict(), scheduler.state_dict()
    again = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    resumed = build_scheduler(again, max_iter=20, steps=(9, 15), warmup_iters=5)
    again.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    for (expected,) in uninterrupted[7:]:
        assert again.param_groups[0]["lr"] == expected
        again.step()
        resumed.step()


def test_steps_beyond_the_end_are_reported(caplog):
    learning_rates((1.0,), max_iter=10, steps=(5, 10), warmup_iters=0)
    assert "SOLVER.STEPS (5, 10)" in caplog.text
    assert "SOLVER.MAX_ITER (10)" in caplog.text


def momentum_sgd(model):
    return build_optimizer(model, base_lr=0.1, momentum=0.9, weight_decay=0.0)


def test_momentum_begins_at_zero_where_the_first_step_is_left_out():
    # Memory that was used before is not zero.
    used = [torch.full((300, 300), 1e30) for _ in range(8)]
    del used
    model = nn.Linear(300, 300, bias=False)
    before = model.weight.detach().clone()
    optimizer = momentum_sgd(model)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before, rtol=0, atol=0)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before - 0.1)


def test_parameter_whose_first_gradient_comes_late():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    before = model[1].weight.detach().clone()
    optimizer = momentum_sgd(model)
    model[0].weight.grad = torch.ones(2, 2)
    optimizer.step()
    model[1].weight.grad = torch.ones(2, 2)
    optimizer.step()
    torch.testing.assert_close(model[1].weight.detach(), before - 0.1)

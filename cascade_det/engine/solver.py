"""Optimisers, gradient clipping and learning-rate schedules, by Detectron2's rules."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
    StepWithFixedGammaParamScheduler,
)
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

logger = logging.getLogger(__name__)

GradientClipper = Callable[[Iterable[nn.Parameter]], object]

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
)


def build_optimizer(
    model: nn.Module,
    *,
    name: str = "SGD",
    base_lr: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 1e-4,
    weight_decay_norm: float | None = 0.0,
    bias_lr_factor: float = 1.0,
    weight_decay_bias: float | None = None,
) -> Optimizer:
    """Optimise the parameters that require gradients.

    Args:
        model: a parameter that it shares between modules is taken once, where it comes first.
        name: "SGD" or "AdamW".
        base_lr: the learning rate that the schedule multiplies.
        momentum: SGD's.
        nesterov: SGD's.
        weight_decay: of all other parameters, but never of those named ``attention_biases``:
            EfficientViT (arXiv 2305.07027) and Swin (arXiv 2103.14030) train these without decay.
        weight_decay_norm: weight decay of normalisation layers; ``None`` for ``weight_decay``.
        bias_lr_factor: multiplies the learning rate of parameters named ``bias``.
        weight_decay_bias: their weight decay; ``None`` for ``weight_decay``. It takes precedence
            over ``weight_decay_norm``.

    Returns:
        The optimiser, fused. Parameters with equal settings share a group, so that one kernel
        updates many tensors.

    """
    groups = _parameter_groups(model, base_lr, weight_decay_norm, bias_lr_factor, weight_decay_bias)
    if name == "SGD":
        sgd = torch.optim.SGD(
            groups,
            lr=base_lr,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            fused=True,
        )
        sgd.register_step_pre_hook(_begin_momentum)
        return sgd
    assert name == "AdamW", name
    return torch.optim.AdamW(groups, lr=base_lr, weight_decay=weight_decay, fused=True)


def _begin_momentum(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Start momentum at zero.

    The fused kernel would start from uninitialised memory if the loss scaler skips the first step,
    and fail for a parameter that gets its first gradient later than others.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            state = optimizer.state[parameter]
            if parameter.grad is not None and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def build_gradient_clipper(clip: Mapping[str, Any] | None) -> GradientClipper | None:
    """The function that clips the gradients of parameters between backward and step.

    Args:
        clip: ``None`` for no clipping, else ``type``, ``value`` and, for norms, ``norm_type``.
            Type "value" limits every element to [-value, value], "norm" the norm of each
            parameter's gradient, "full_model" the norm of all gradients together.
    """
    if clip is None:
        return None
    kind, value, norm_type = clip["type"], float(clip["value"]), float(clip.get("norm_type", 2.0))

    if kind == "value":
        return partial(nn.utils.clip_grad_value_, clip_value=value)
    clip_norm = partial(nn.utils.clip_grad_norm_, max_norm=value, norm_type=norm_type)
    if kind == "full_model":
        return clip_norm

    def clip_each(parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            clip_norm(parameter)

    return clip_each


def build_scheduler(
    optimizer: Optimizer,
    *,
    name: str = "WarmupMultiStepLR",
    max_iter: int,
    gamma: float = 0.1,
    steps: Sequence[int] = (),
    base_lr: float = 1.0,
    base_lr_end: float = 0.0,
    num_decays: int = 3,
    warmup_factor: float = 0.001,
    warmup_iters: int = 1000,
    warmup_method: str = "linear",
    rescale_interval: bool = False,
) -> LambdaLR:
    """A schedule that is stepped once per iteration and multiplies every group's learning rate.

    Args:
        optimizer: its groups' learning rates are multiplied.
        name: "WarmupMultiStepLR", "WarmupCosineLR" or "WarmupStepWithFixedGammaLR".
        max_iter: iterations of the whole training.
        gamma: factor of one decay, except for the cosine.
        steps: iterations at which "WarmupMultiStepLR" decays.
        base_lr: start of the cosine.
        base_lr_end: end of the cosine.
        num_decays: number of evenly spaced decays of "WarmupStepWithFixedGammaLR".
        warmup_factor: start of the warm-up, relative to the schedule's first value.
        warmup_iters: iterations of the warm-up.
        warmup_method: "linear", or "constant" at ``warmup_factor``.
        rescale_interval: fit the whole schedule into the iterations after the warm-up, instead of
            skipping its beginning.
    """
    schedule: ParamScheduler
    if name == "WarmupMultiStepLR":
        schedule = _multi_step(steps, gamma, max_iter)
    elif name == "WarmupCosineLR":
        schedule = CosineParamScheduler(1.0, base_lr_end / base_lr)
    else:
        assert name == "WarmupStepWithFixedGammaLR", name
        schedule = StepWithFixedGammaParamScheduler(
            base_value=1.0, num_decays=num_decays, gamma=gamma, num_updates=max_iter
        )
    warmup_length = min(warmup_iters / max_iter, 1.0)
    multiplier = _with_warmup(
        schedule, warmup_factor, warmup_length, warmup_method, rescale_interval
    )

    def factor(iteration: int) -> float:
        # The step after the last iteration is unused, and some of fvcore's schedulers fail there.
        return multiplier(min(iteration, max_iter - 1) / max_iter)

    return LambdaLR(optimizer, factor)


def _parameter_groups(
    model: nn.Module,
    base_lr: float,
    weight_decay_norm: float | None,
    bias_lr_factor: float,
    weight_decay_bias: float | None,
) -> list[dict[str, Any]]:
    groups: dict[tuple[tuple[str, float], ...], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            settings = {"lr": base_lr}
            if isinstance(module, _NORMS) and weight_decay_norm is not None:
                settings["weight_decay"] = weight_decay_norm
            if name == "bias":
                settings["lr"] = base_lr * bias_lr_factor
                if weight_decay_bias is not None:
                    settings["weight_decay"] = weight_decay_bias
            if name == "attention_biases":
                settings["weight_decay"] = 0.0
            groups.setdefault(tuple(settings.items()), []).append(parameter)
    return [{**dict(settings), "params": parameters} for settings, parameters in groups.items()]


def _multi_step(steps: Sequence[int], gamma: float, max_iter: int) -> ParamScheduler:
    reached = [step for step in steps if step < max_iter]
    if len(reached) != len(steps):
        logger.warning(
            "SOLVER.STEPS %s: steps from SOLVER.MAX_ITER (%d) on are never reached.",
            tuple(steps),
            max_iter,
        )
    return MultiStepParamScheduler(
        values=[gamma**power for power in range(len(reached) + 1)],
        milestones=reached,
        num_updates=max_iter,
    )


def _with_warmup(
    schedule: ParamScheduler, factor: float, length: float, method: str, rescale: bool
) -> ParamScheduler:
    start = factor * schedule(0.0)
    # Some of fvcore's schedulers have no value at 1, where a warm-up of the whole training ends.
    end = schedule(0.0 if rescale else min(length, 1.0 - 1e-5))
    is_linear = method == "linear"
    warmup = LinearParamScheduler(start, end) if is_linear else ConstantParamScheduler(start)
    return CompositeParamScheduler(
        [warmup, schedule],
        lengths=[length, 1 - length],
        interval_scaling=["rescaled", "rescaled" if rescale else "fixed"],
    )

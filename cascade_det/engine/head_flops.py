"""Multiply-adds of the heads for one region and for one mask, counted by fvcore."""

from __future__ import annotations

from itertools import accumulate, repeat

import torch
from torch import nn

from cascade_det.core import CascadeHead, MaskBranch, RoIPooler
from cascade_det.core.modes import evaluation_mode
from cascade_det.evaluation import RegionFlops
from cascade_det.quiet_imports import without_jit_warning

with without_jit_warning():
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import matmul_flop_jit


def region_flops(cascade: CascadeHead, channels: int) -> RegionFlops:
    """Operations of the box head and the predictor of each stage, without RoI pooling.

    One multiply-add is one operation, as fvcore counts; activations are none.

    Args:
        cascade: its modules run once, on one region of zeros.
        channels: C of the feature maps.
    """
    stages = list(zip(cascade.box_head, cascade.box_predictor, strict=True))
    pooled = _zeros(cascade.box_predictor, channels, cascade.pooler)
    of_stages = [_operations(nn.Sequential(*stage), (pooled,)) for stage in stages]
    # Some ensembles run the heads so far again on the last crop.
    runs_again = cascade.ensemble.name == "last_boxes"
    of_scores = accumulate(of_stages) if runs_again else repeat(0.0, len(of_stages))
    return RegionFlops(tuple(of_stages), tuple(of_scores))


def mask_flops(masks: MaskBranch, channels: int) -> float:
    """Operations of all mask heads for one mask, without RoI pooling; as in ``region_flops``.

    Args:
        masks: its modules run once, on one region of zeros.
        channels: C of the feature maps.
    """
    # With gradients, a fast head runs plain layers, which fvcore knows.
    pooled = _zeros(masks.head, channels, masks.pooler).requires_grad_()
    classes = torch.zeros(1, dtype=torch.int64, device=pooled.device)
    return sum(_operations(head, (pooled, classes)) for head in masks.heads)


def _zeros(module: nn.Module, channels: int, pooler: RoIPooler) -> torch.Tensor:
    """One region ``[1, C, P, P]`` in the type and on the device of a module."""
    parameter, side = next(module.parameters()), pooler.output_size
    return parameter.new_zeros(1, channels, side, side)


def _operations(head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> float:
    with evaluation_mode(head), torch.set_grad_enabled(inputs[0].requires_grad):
        counts = FlopCountAnalysis(head, inputs)
        # The first input is the bias.
        counts.set_op_handle("aten::baddbmm", lambda i, o: matmul_flop_jit(i[1:3], o))
        counts.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return float(counts.total())

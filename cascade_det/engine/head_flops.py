"""Multiply-adds of the box heads for one region, counted by fvcore."""

from __future__ import annotations

from itertools import accumulate, repeat

import torch
from torch import nn

from cascade_det.core import CascadeHead
from cascade_det.core.modes import evaluation_mode
from cascade_det.evaluation import RegionFlops
from cascade_det.quiet_imports import without_jit_warning

with without_jit_warning():
    from fvcore.nn import FlopCountAnalysis


def region_flops(cascade: CascadeHead, channels: int) -> RegionFlops:
    """Operations of the box head and the predictor of each stage, without RoI pooling.

    One multiply-add is one operation, as fvcore counts; activations are none.

    Args:
        cascade: its modules run once, on one region of zeros.
        channels: C of the feature maps.
    """
    stages = list(zip(cascade.box_head, cascade.box_predictor, strict=True))
    parameter = next(cascade.box_predictor.parameters())
    side = cascade.pooler.output_size
    pooled = torch.zeros(1, channels, side, side, dtype=parameter.dtype, device=parameter.device)
    of_stages = [_operations(nn.Sequential(*stage), pooled) for stage in stages]
    # Some ensembles run the heads so far again on the last crop.
    runs_again = cascade.ensemble.name == "last_boxes"
    of_scores = accumulate(of_stages) if runs_again else repeat(0.0, len(of_stages))
    return RegionFlops(tuple(of_stages), tuple(of_scores))


def _operations(head: nn.Module, pooled: torch.Tensor) -> float:
    with evaluation_mode(head), torch.no_grad():
        counts = FlopCountAnalysis(head, pooled)
        counts.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return float(counts.total())

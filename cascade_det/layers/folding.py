"""Folds batch norms into the convolutions before them, for inference."""

from __future__ import annotations

import itertools
from typing import TypeAlias, TypeGuard

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops.misc import FrozenBatchNorm2d

from cascade_det.layers.conv_norm import ConvNorm

_Norm: TypeAlias = FrozenBatchNorm2d | _BatchNorm


def fold_norms(module: nn.Module) -> int:
    """Fold batch norms with fixed statistics into the convolutions before them, in place.

    These are the norms of every ``ConvNorm``, and norms after a convolution in an
    ``nn.Sequential``, if they are frozen or in evaluation mode. The output of the module stays the
    same up to rounding.

    Returns:
        The number of folded norms.
    """
    count = 0
    for child in list(module.modules()):
        if isinstance(child, ConvNorm) and is_fixed(child.norm):
            _fold(child, child.norm)
            child.norm = None
            count += 1
        if isinstance(child, nn.Sequential):
            for (_, conv), (name, norm) in itertools.pairwise(list(child.named_children())):
                if type(conv) is nn.Conv2d and is_fixed(norm):
                    _fold(conv, norm)
                    setattr(child, name, nn.Identity())
                    count += 1
    return count


def is_fixed(norm: nn.Module | None) -> TypeGuard[_Norm]:
    """Whether a norm is a batch norm with fixed statistics."""
    if isinstance(norm, _BatchNorm):
        return not norm.training and norm.track_running_stats
    # Detectron2's has the same buffers and, as torchvision's, no parameters.
    return norm is not None and not list(norm.parameters()) and hasattr(norm, "running_var")


def _fold(conv: nn.Conv2d, norm: _Norm) -> None:
    # In float64, to round once.
    mean, variance, scale, shift, bias = (
        None if x is None else x.detach().double()
        for x in (norm.running_mean, norm.running_var, norm.weight, norm.bias, conv.bias)
    )
    assert mean is not None
    assert variance is not None
    folded = fuse_conv_bn_weights(
        conv.weight.detach().double(), bias, mean, variance, norm.eps, scale, shift
    )
    conv.weight, conv.bias = (
        nn.Parameter(x.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)
        for x in folded
    )

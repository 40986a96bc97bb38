"""Predictions of an RPN head for the anchors sampled for its loss only.

The loss uses a few hundred anchors of an image, of hundreds of thousands. On whole maps, the
gradient of the head's 3x3 convolution is a sixth of the work of a training step and zero at all but
a few hundred positions. Here the head runs on patches around the sampled anchors, forward and
backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.core.structures.on_device import device_constant, indices_by_group
from cascade_det.layers.rpn_head import RPNHead


def predictions_at(
    head: RPNHead, features: Sequence[Tensor], image: Tensor, anchor: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs of ``head(features)`` for S sampled anchors, with gradients.

    Args:
        head: of the RPN, with A anchors at each position.
        features: L maps ``[N, C, H_l, W_l]``.
        image: int64 ``[S]`` in ``[0, N)``.
        anchor: int64 ``[S]``, index among the anchors of all levels, in the order (level, y, x,
            anchor of the position).

    Returns:
        Logits ``[S]`` and deltas ``[S, 4]``.
    """
    num_anchors = head.objectness_logits.out_channels
    patches, inside = _patches(features, image, anchor // num_anchors, len(head.convs))
    for conv in head.convs:
        assert isinstance(conv, nn.Conv2d)
        patches, inside = F.relu(F.conv2d(patches, conv.weight, conv.bias)), inside[..., 1:-1, 1:-1]
        # A whole map is padded with zeros before every convolution.
        patches = patches * inside
    hidden = patches.flatten(1)  # [S, C, 1, 1] -> [S, C]
    logits = F.linear(hidden, head.objectness_logits.weight.flatten(1), head.objectness_logits.bias)
    deltas = F.linear(hidden, head.anchor_deltas.weight.flatten(1), head.anchor_deltas.bias)
    sample, which = torch.arange(len(anchor), device=anchor.device), anchor % num_anchors
    return logits[sample, which], deltas.unflatten(1, (-1, 4))[sample, which]


def _patches(
    features: Sequence[Tensor], image: Tensor, position: Tensor, radius: int
) -> tuple[Tensor, Tensor]:
    """Windows of the maps around S positions, and masks that are 1 inside of the maps.

    Args:
        features: L maps ``[N, C, H_l, W_l]``.
        image: int64 ``[S]`` in ``[0, N)``.
        position: int64 ``[S]``, index among the positions of all levels.
        radius: of the windows; their sides have ``P = 2 * radius + 1`` positions.

    Returns:
        Windows ``[S, C, P, P]`` and masks ``[S, 1, P, P]``.
    """
    device = image.device
    shapes = tuple((f.shape[-2], f.shape[-1], f.shape[-2] * f.shape[-1]) for f in features)
    table = device_constant(shapes, torch.int64, device)  # [L, 3]
    ends = table[:, 2].cumsum(0)
    level = torch.bucketize(position, ends, right=True)
    height, width, area = table[level].unbind(1)
    in_level = position - (ends[level] - area)
    shift = torch.arange(-radius, radius + 1, device=device)
    y = (in_level // width)[:, None] + shift
    x = (in_level % width)[:, None] + shift
    inside_y = (y >= 0) & (y < height[:, None])
    inside_x = (x >= 0) & (x < width[:, None])
    inside = inside_y[:, :, None] & inside_x[:, None]  # [S, P, P]
    rows = (image * area)[:, None, None] + y[:, :, None] * width[:, None, None] + x[:, None]
    rows = rows.where(inside, 0)
    # Level by level: one table of all levels would copy the whole pyramid.
    samples = indices_by_group(level, len(features))
    windows = [
        F.embedding(rows[own], feature.permute(0, 2, 3, 1).flatten(0, 2))
        for own, feature in zip(samples, features, strict=True)
    ]
    mask = inside[:, None].to(features[0].dtype)
    return torch.cat(windows)[torch.cat(samples).argsort()].permute(0, 3, 1, 2) * mask, mask

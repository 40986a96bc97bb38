"""What an RPN's head says of the anchors that its loss looks at, and of no others.

The loss has some hundred anchors of an image, the pyramid hundreds of thousands. Taken over whole
maps, the gradient of the head's 3x3 convolution is a sixth of the work of a training step, and all
but a few hundred positions of it are zero. Here the head sees the surroundings of the chosen
anchors alone, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.standalone.rpn_head import RPNHead


def predictions_at(
    head: RPNHead, features: Sequence[Tensor], image: Tensor, anchor: Tensor
) -> tuple[Tensor, Tensor]:
    """What ``head(features)`` gives for S chosen anchors, with gradients.

    Args:
        head: of the RPN; A anchors at each position.
        features: L maps ``[N, C, H_l, W_l]``.
        image: int64 ``[S]`` in ``[0, N)``.
        anchor: int64 ``[S]``, places among those of all levels, ordered (level, y, x, anchor).

    Returns:
        Logits ``[S]`` and deltas ``[S, 4]``.
    """
    num_anchors = head.objectness_logits.out_channels
    patches, inside = _patches(features, image, anchor // num_anchors, len(head.convs))
    for conv in head.convs:
        assert isinstance(conv, nn.Conv2d)
        patches, inside = F.relu(F.conv2d(patches, conv.weight, conv.bias)), inside[..., 1:-1, 1:-1]
        # As on a whole map: around it there are zeros, not what a convolution makes of them.
        patches = patches * inside
    hidden = patches.flatten(1)
    logits = F.linear(hidden, head.objectness_logits.weight.flatten(1), head.objectness_logits.bias)
    deltas = F.linear(hidden, head.anchor_deltas.weight.flatten(1), head.anchor_deltas.bias)
    rows, which = torch.arange(len(anchor), device=anchor.device), anchor % num_anchors
    return logits[rows, which], deltas.unflatten(1, (-1, 4))[rows, which]


def _patches(
    features: Sequence[Tensor], image: Tensor, position: Tensor, radius: int
) -> tuple[Tensor, Tensor]:
    """Windows of the maps ``[S, C, 2 radius + 1, ...]``, and what of them lies inside, 0 or 1.

    Args:
        features: see ``predictions_at``.
        image: likewise.
        position: int64 ``[S]``, among those of all levels.
        radius: pixels around a position.
    """
    device = image.device
    shapes = torch.tensor([(*f.shape[-2:], f.shape[-2] * f.shape[-1]) for f in features])
    ends = shapes[:, 2].cumsum(0)
    level = torch.bucketize(position, ends.to(device), right=True)
    height, width, area = shapes.to(device)[level].unbind(1)
    place = position - (ends - shapes[:, 2]).to(device)[level]
    shift = torch.arange(-radius, radius + 1, device=device)
    y = (place // width)[:, None] + shift
    x = (place % width)[:, None] + shift
    inside_y = (y >= 0) & (y < height[:, None])
    inside_x = (x >= 0) & (x < width[:, None])
    inside = inside_y[:, :, None] & inside_x[:, None]
    rows = (image * area)[:, None, None] + y[:, :, None] * width[:, None, None] + x[:, None]
    rows = rows.where(inside, 0)
    # Level by level: a table of all of them would be one more copy of the pyramid.
    order = level.argsort(stable=True)
    counts = torch.bincount(level, minlength=len(features)).tolist()
    windows = [
        F.embedding(part, feature.permute(0, 2, 3, 1).flatten(0, 2))
        for part, feature in zip(rows[order].split(counts), features, strict=True)
    ]
    mask = inside[:, None].to(features[0].dtype)
    return torch.cat(windows)[order.argsort()].permute(0, 3, 1, 2) * mask, mask

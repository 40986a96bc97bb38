"""Masks of a cascade and their loss, one region at a time in double precision.

Shares no code with ``cascade_det``, only the names of the weights in the state dict.
"""

import math

import torch
from naive_exits import iou
from torch.nn import functional as F
from torchvision.ops import roi_align


def naive_mask(twin, features, image, box, label, size, num_stages=None):
    """Probabilities ``[M, M]`` of the object of a box: the mean of the heads, if stages have some.

    Args:
        twin: a ``NaiveCascade`` with the weights.
        features: maps of the batch.
        image: of the box.
        box: four numbers.
        label: its class.
        size: cells per side of a crop.
        num_stages: how many heads count; ``None`` for all.
    """
    maps = [f.detach().double() for f in features]
    crop = twin.pool(maps, image, tuple(box), size, 0, True)
    per_stage = "mask_head.0.deconv.weight" in twin.state
    stages = range(twin.num_stages if num_stages is None else num_stages) if per_stage else [None]
    prefixes = ["mask_head." if s is None else f"mask_head.{s}." for s in stages]
    masks = [logits_of(twin.state, prefix, crop, label).sigmoid() for prefix in prefixes]
    return sum(masks) / len(masks)


def logits_of(state, prefix, crop, label):
    """Of one class: ``[M, M]``, from a crop ``[1, C, P, P]``."""

    def weights(name):
        return state[f"{prefix}{name}.weight"], state[f"{prefix}{name}.bias"]

    x, i = crop, 1
    while f"{prefix}mask_fcn{i}.weight" in state:
        x, i = F.conv2d(x, *weights(f"mask_fcn{i}"), padding=1).clamp(min=0), i + 1
    x = F.conv_transpose2d(x, *weights("deconv"), stride=2).clamp(min=0)
    every = F.conv2d(x, *weights("predictor"))[0]
    return every[label if len(every) > 1 else 0]


def naive_mask_loss(regions, objects, masks):
    """Mean binary cross-entropy over the cells of all foreground regions with a mask.

    Args:
        regions: image, box and logits ``[M, M]`` of each foreground region.
        objects: boxes of each image.
        masks: a bitmap for each object of each image, or ``None``.
    """
    total, cells = 0.0, 0
    for image, box, logits in regions:
        overlaps = [iou(box, other) for other in objects[image]]
        mask = masks[image][overlaps.index(max(overlaps))]
        if mask is None:
            continue
        size = logits.shape[-1]
        crop = roi_align(
            mask[None, None].double(), [torch.tensor([box]).double()], size, 1.0, 0, True
        )
        for logit, target in zip(logits.flatten().tolist(), crop.flatten().tolist(), strict=True):
            prob = 1 / (1 + math.exp(-logit))
            total -= math.log(prob if target >= 0.5 else 1 - prob)
            cells += 1
    return total / cells if cells else 0.0

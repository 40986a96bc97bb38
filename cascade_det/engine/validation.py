"""Losses on validation images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

from cascade_det.core.modes import evaluation_mode
from cascade_det.data.samples import Batch
from cascade_det.engine.detector import Detector, Segmenter
from cascade_det.engine.precision import autocast
from cascade_det.parallel import distributed

# The sampling of regions must not change from one evaluation to the next.
_SEED = 0


def validation_losses(
    detector: Detector | Segmenter,
    loader: Iterable[Batch],
    *,
    amp_dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Mean losses over the images of a loader, without gradients and with norms as in inference.

    The caller's random state stays as it was.

    Args:
        detector: in any mode.
        loader: batches with ground truth; of several processes, each passes its share.
        amp_dtype: type of mixed precision; ``None`` for float32.

    Returns:
        The losses by name, and their sum as ``total_loss``; empty without images.
    """
    assert isinstance(detector, nn.Module)
    device = next(detector.parameters()).device
    sums: dict[str, float] = defaultdict(float)
    images = 0
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        evaluation_mode(detector),
        torch.no_grad(),
    ):
        torch.manual_seed(_SEED)
        for batch in loader:
            with autocast(device, amp_dtype):
                losses = detector.losses(batch)
            values = torch.stack(list(losses.values())).tolist()
            for name, value in zip(losses, values, strict=True):
                sums[name] += value * len(batch)
            images += len(batch)
    shares = distributed.all_gather((dict(sums), images))
    total = sum(count for _, count in shares)
    names = dict.fromkeys(name for share, _ in shares for name in share)
    means = {name: sum(share.get(name, 0.0) for share, _ in shares) / total for name in names}
    return {**means, "total_loss": sum(means.values())} if means else {}

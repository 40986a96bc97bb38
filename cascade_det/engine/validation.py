"""The losses on images that are not trained on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from cascade_det.core.modes import evaluation_mode
from cascade_det.engine.precision import amp_dtype_of, autocast
from cascade_det.parallel import distributed

# Which regions are sampled must not change from one evaluation to the next.
_SEED = 0


def validation_losses(
    detector: nn.Module,
    loader: Iterable[list[dict[str, Any]]],
    *,
    amp_dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Mean losses over the images of a loader, without gradients and with norms as in inference.

    The random numbers of the caller are left as they were.

    Args:
        detector: has ``losses(batch)``.
        loader: batches with ground truth; of several processes, each gives its share.
        amp_dtype: type of mixed precision; ``None`` for float32.
        device: of the detector.

    Returns:
        The losses by their names, and their sum as ``total_loss``; empty without images.
    """
    model: Any = getattr(detector, "module", detector)
    device = torch.device(device)
    sums: dict[str, float] = defaultdict(float)
    images = 0
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        evaluation_mode(model),
        torch.no_grad(),
    ):
        torch.manual_seed(_SEED)
        for batch in loader:
            with autocast(device, amp_dtype_of(amp_dtype)):
                losses = model.losses(batch)
            values = torch.stack(list(losses.values())).tolist()
            for name, value in zip(losses, values, strict=True):
                sums[name] += value * len(batch)
            images += len(batch)
    shares = distributed.all_gather((dict(sums), images))
    total = sum(count for _, count in shares)
    names = dict.fromkeys(name for share, _ in shares for name in share)
    means = {name: sum(share.get(name, 0.0) for share, _ in shares) / total for name in names}
    return {**means, "total_loss": sum(means.values())} if means else {}

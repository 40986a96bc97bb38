"""Whether the kernels in Triton run on a device; without them torchvision's do the work."""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache

import torch

logger = logging.getLogger(__name__)

# Of NVIDIA's GPUs: the oldest that the kernels are compiled for in the tests, a T4.
_OLDEST = (7, 5)


@lru_cache
def has_triton(device: torch.device) -> bool:
    """Whether kernels in Triton run on a device; tried once, where Triton is installed."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < _OLDEST:
        return False
    try:
        _try_on(device)
    except Exception as error:  # a compiler that is missing, a driver that is too old
        logger.warning(
            "Triton is installed, but its kernels do not run on %s, so torchvision's are used, "
            "which are slower: %s: %s",
            device,
            type(error).__name__,
            error,
        )
        return False
    return True


def _try_on(device: torch.device) -> None:
    """Run the smaller kernel on two equal boxes.

    Raises:
        Exception: of whatever kind Triton raises, or if the result is wrong.
    """
    from cascade_det.layers.triton_nms import nms_of_lists

    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2, device=device)
    kept = nms_of_lists(boxes, torch.tensor([0, 2], device=device), 0.5).tolist()
    if kept != [True, False]:
        raise RuntimeError(f"NMS of two equal boxes kept {kept}")

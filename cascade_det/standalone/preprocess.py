"""Images as batches of a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def normalise_and_stack(
    images: Sequence[Tensor],
    mean: Tensor,
    std: Tensor,
    *,
    step: int = 1,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Normalise, pad with 0 on the right and at the bottom, and stack.

    Args:
        images: N of uint8 ``[3, H_i, W_i]``.
        mean: ``[3, 1, 1]``, on the device of the batch.
        std: ``[3, 1, 1]``.
        step: height and width of the batch are multiples of it.
        memory_format: of the batch.

    Returns:
        float32 ``[N, 3, H, W]`` and ``(H_i, W_i)`` of every image.
    """
    sizes = [(image.shape[-2], image.shape[-1]) for image in images]
    height, width = (-(-max(side) // step) * step for side in zip(*sizes, strict=True))
    batch = torch.empty(
        (len(images), 3, height, width), device=mean.device, memory_format=memory_format
    ).zero_()
    for padded, image in zip(batch, _sent(images, mean.device), strict=True):
        normalised = (image - mean).div_(std)
        padded[:, : image.shape[-2], : image.shape[-1]].copy_(normalised)
    return batch, sizes


def _sent(images: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The images on a device, in one transfer if all of them are on another one."""
    devices = {image.device for image in images}
    if len(images) == 1 or len(devices) > 1 or device in devices:
        return [image.to(device) for image in images]
    pixels = torch.cat([image.flatten() for image in images]).to(device)
    parts = pixels.split([image.numel() for image in images])
    return [part.view(image.shape) for part, image in zip(parts, images, strict=True)]

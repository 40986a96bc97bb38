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
    for padded, image in zip(batch, send(images, mean.device), strict=True):
        normalised = (image - mean).div_(std)
        padded[:, : image.shape[-2], : image.shape[-1]].copy_(normalised)
    return batch, sizes


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors on a device.

    From the CPU to a GPU, tensors of one dtype go in one transfer, for which the CPU does not wait:
    from pinned memory, which PyTorch keeps until the GPU has read it.

    Args:
        tensors: any number, of any shapes.
        device: where they are needed.
    """
    kinds = {(x.device.type, x.dtype) for x in tensors}
    if device.type != "cuda" or len(kinds) != 1 or ("cpu", tensors[0].dtype) not in kinds:
        return [x.to(device) for x in tensors]
    sizes = [x.numel() for x in tensors]
    pinned = torch.empty(sum(sizes), dtype=tensors[0].dtype, pin_memory=True)
    torch.cat([x.flatten() for x in tensors], out=pinned)
    parts = pinned.to(device, non_blocking=True).split(sizes)
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]

"""Box arithmetic on flat batches: regression deltas, clipping, IoU, image indices.

Boxes are float32 XYXY in absolute pixels. Decoding is float32 even under autocast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cascade_det.core.structures.on_device import device_constant

# A side grows at most to 1000 px from a stride of 16 in one step (Detectron's clamp).
MAX_LOG_SCALE = math.log(1000.0 / 16)

Weights = tuple[float, float, float, float]
ImageSizes = Sequence[tuple[int, int]]  # (height, width) of each image, in pixels


def encode_boxes(boxes: Tensor, targets: Tensor, weights: Weights) -> Tensor:
    """Deltas (dx, dy, dw, dh) that move ``boxes`` onto ``targets``.

    The parametrisation of R-CNN (arXiv 1311.2524, appendix C), times ``weights``:
    Cascade R-CNN's (arXiv 1712.00726, section 4.1) division by per-stage deviations.

    Args:
        boxes: ``[R, 4]`` with positive width and height.
        targets: ``[R, 4]`` with positive width and height.
        weights: multipliers of (dx, dy, dw, dh).

    Returns:
        float32 ``[R, 4]``.
    """
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    center_x, center_y = boxes[:, 0] + 0.5 * width, boxes[:, 1] + 0.5 * height
    target_width, target_height = targets[:, 2] - targets[:, 0], targets[:, 3] - targets[:, 1]
    target_x, target_y = targets[:, 0] + 0.5 * target_width, targets[:, 1] + 0.5 * target_height
    wx, wy, ww, wh = weights
    return torch.stack(
        (
            wx * (target_x - center_x) / width,
            wy * (target_y - center_y) / height,
            ww * torch.log(target_width / width),
            wh * torch.log(target_height / height),
        ),
        dim=1,
    )


def decode_boxes(deltas: Tensor, boxes: Tensor, weights: Weights) -> Tensor:
    """Apply deltas to boxes: the inverse of ``encode_boxes`` up to the scale clamp.

    Args:
        deltas: ``[R, 4 k]``, k deltas for each box (k classes, or 1).
        boxes: ``[R, 4]``.
        weights: the multipliers of the deltas.

    Returns:
        float32 ``[R, 4 k]``.
    """
    deltas, boxes = deltas.float(), boxes.float()
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    center_x, center_y = boxes[:, 0] + 0.5 * width, boxes[:, 1] + 0.5 * height
    wx, wy, ww, wh = weights
    # Each [R, k].
    new_x = deltas[:, 0::4] / wx * width[:, None] + center_x[:, None]
    new_y = deltas[:, 1::4] / wy * height[:, None] + center_y[:, None]
    half_width = 0.5 * (torch.exp((deltas[:, 2::4] / ww).clamp(max=MAX_LOG_SCALE)) * width[:, None])
    half_height = 0.5 * (
        torch.exp((deltas[:, 3::4] / wh).clamp(max=MAX_LOG_SCALE)) * height[:, None]
    )
    corners = (new_x - half_width, new_y - half_height, new_x + half_width, new_y + half_height)
    return torch.stack(corners, dim=-1).reshape(deltas.shape)  # [R, k, 4] to [R, 4 k]


def clip_boxes(boxes: Tensor, bounds: Tensor) -> Tensor:
    """Clip boxes to their image.

    Args:
        boxes: ``[R, ..., 4]``.
        bounds: ``[R, 4]``, the row of ``image_bounds`` for each box.

    Returns:
        The shape of ``boxes``; NaN stays NaN.
    """
    for _ in range(boxes.dim() - 2):
        bounds = bounds.unsqueeze(1)
    return torch.minimum(boxes.clamp(min=0), bounds)


def image_bounds(image_sizes: ImageSizes, like: Tensor) -> Tensor:
    """(width, height, width, height) of each image, on the device of ``like``: not to be changed.

    Args:
        image_sizes: ``(height, width)`` of N images in pixels.
        like: any tensor.

    Returns:
        float32 ``[N, 4]``.
    """
    if not torch.jit.is_tracing():
        rows = tuple((int(width), int(height)) * 2 for height, width in image_sizes)
        return device_constant(rows, torch.float32, like.device)
    # Under a tracer sizes are tensors, and have to stay in its graph.
    tensors = [size if torch.is_tensor(size) else torch.tensor(size) for size in image_sizes]
    sizes = torch.stack(tensors).to(torch.float32)  # [N, 2]
    return _on_device_of(sizes.flip(1).repeat(1, 2), like)


@torch.jit.script_if_tracing
def _on_device_of(tensor: Tensor, other: Tensor) -> Tensor:
    # Scripted, so that a trace made on one device runs on another.
    return tensor.to(other.device)


def is_nonempty(boxes: Tensor, min_size: float = 0.0) -> Tensor:
    """Whether both sides are longer than ``min_size`` pixels: bool ``[R]`` for ``[R, 4]``."""
    return (boxes[:, 2:] - boxes[:, :2] > min_size).all(dim=1)


def select_class(per_class: Tensor, classes: Tensor) -> Tensor:
    """The four values ``[R, 4]`` of one class per row of ``[R, 4 K]``; ``[R, 4]`` stays as is."""
    if per_class.shape[1] == 4:
        return per_class
    per_class = per_class.unflatten(1, (-1, 4))  # [R, K, 4]
    return per_class[torch.arange(classes.shape[0], device=classes.device), classes]


def flatten_images(per_image: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Concatenate the rows of all images.

    Args:
        per_image: at least one tensor ``[R_i, ...]``.

    Returns:
        ``[R, ...]`` and the int64 ``[R]`` image index of each row.
    """
    # shape[0], not len(), which a tracer records as a constant.
    image_index = [
        rows.new_full((rows.shape[0],), i, dtype=torch.int64) for i, rows in enumerate(per_image)
    ]
    return torch.cat(list(per_image)), torch.cat(image_index)


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Row-wise IoU of two ``[R, 4]``: ``[R]`` in [0, 1]; 0 where both boxes are empty."""
    sizes = torch.minimum(boxes[:, 2:], others[:, 2:]) - torch.maximum(boxes[:, :2], others[:, :2])
    intersection = sizes.clamp(min=0).prod(dim=1)  # [R]
    areas = [(b[:, 2:] - b[:, :2]).prod(dim=1) for b in (boxes, others)]
    union = areas[0] + areas[1] - intersection
    return intersection / union.where(union > 0, 1.0)

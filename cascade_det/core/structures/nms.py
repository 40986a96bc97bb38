"""Per-class NMS of the images of a batch, as one operation that a GPU is not waited for.

Its result has a fixed size. On GPUs with Triton all lists, one for each class of each image, are
done at once, without a shift of coordinates. Elsewhere torchvision's NMS goes image by image, with
Detectron2's decisions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

from cascade_det.core.structures.on_device import group_sizes, indices_by_group
from cascade_det.layers import gpu_kernels

# So many boxes are moved apart, class by class, for one call of NMS. In float32 torchvision's
# numbers, so that decisions are Detectron2's. In float64 the move costs no accuracy, and one call,
# though quadratic, is faster up to about this number (80 classes, on a CPU).
_MOST_IN_ONE_CALL = {"cpu": 1_000, "cuda": 25_000}
_MOST_IN_FLOAT64 = 10_000

_OPERATION = "cascade_det::batched_nms"


def nms_by_image(
    boxes: Tensor,
    scores: Tensor,
    images: Tensor,
    classes: Tensor,
    *,
    num_images: int,
    num_classes: int,
    iou: float,
) -> list[Tensor]:
    """NMS within each class of each image, with one wait for the device.

    Args:
        boxes: float32 or float64 ``[R, 4]``, XYXY, finite.
        scores: float ``[R]``.
        images: int64 ``[R]`` in ``[0, num_images]``, the image of each box; boxes of ``num_images``
            take no part and need not be finite.
        classes: int64 ``[R]`` in ``[0, num_classes)``.
        num_images: N.
        num_classes: K.
        iou: boxes that overlap a better one of their class and image by more are dropped.

    Returns:
        N int64 tensors: the rows of the boxes that remain, best score first.
    """
    boxes, scores = boxes.detach(), scores.detach()
    if torch.jit.is_tracing():
        # A recorded graph must run without this package, and its sizes must stay dynamic.
        return _rows_by_image(boxes, scores, images, classes, num_images, iou)
    rows, counts = torch.ops.cascade_det.batched_nms(
        boxes, scores, images, classes, num_images, num_classes, iou
    )
    sizes = counts.tolist()
    return list(rows[: sum(sizes)].split(sizes))


def nms_mask(
    boxes: Tensor,
    scores: Tensor,
    images: Tensor,
    classes: Tensor,
    *,
    num_images: int,
    num_classes: int,
    iou: float,
) -> Tensor:
    """Which boxes remain after ``nms_by_image``: bool ``[R]``, without a wait for the device."""
    rows, _ = torch.ops.cascade_det.batched_nms(
        boxes.detach(), scores.detach(), images, classes, num_images, num_classes, iou
    )
    remains = torch.zeros(len(rows) + 1, dtype=torch.bool, device=rows.device)
    return remains.index_fill_(0, rows, True)[:-1]


def grouped_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float) -> Tensor:
    """NMS within each group: torchvision's ``batched_nms``, which sends a number to the device.

    Args:
        boxes: float ``[R, 4]``, XYXY, finite.
        scores: float ``[R]``.
        groups: int64 ``[R]``; boxes of different groups do not suppress each other.
        iou: boxes that overlap a better one by more are dropped.

    Returns:
        int64 indices of the boxes that remain, best score first.
    """
    most = _MOST_IN_ONE_CALL["cpu" if boxes.device.type == "cpu" else "cuda"]
    if boxes.dtype == torch.float64:
        most = _MOST_IN_FLOAT64
    if torch.jit.is_tracing() or not 0 < len(boxes) <= most:
        return batched_nms(boxes, scores, groups, iou)
    apart = groups.to(boxes.dtype) * (boxes.amax() + 1.0)
    return nms(boxes + apart[:, None], scores, iou)


def nms_at_once(
    boxes: Tensor,
    scores: Tensor,
    images: Tensor,
    classes: Tensor,
    num_images: int,
    num_classes: int,
    iou: float,
) -> tuple[Tensor, Tensor]:
    """The operation by the Triton kernel: all lists at once, and no wait."""
    from cascade_det.layers.triton_nms import nms_of_lists

    by_score = torch.argsort(scores, descending=True, stable=True)
    num_lists = num_images * num_classes
    lists = (images * num_classes + classes).clamp(max=num_lists)[by_score]
    lists, place = torch.sort(lists, stable=True)
    starts = torch.searchsorted(lists, torch.arange(num_lists + 1, device=lists.device))
    kept = nms_of_lists(boxes[by_score[place]], starts, iou)
    # From list after list back to best score first.
    kept = torch.empty_like(kept).scatter_(0, place, kept)
    owners, order = torch.sort(images[by_score].where(kept, num_images), stable=True)
    rows = by_score[order].where(owners < num_images, len(owners))
    return rows, group_sizes(owners, num_images + 1)[:-1]


def _shapes(
    boxes: Tensor, scores: Tensor, images: Tensor, classes: Tensor, num_images: int, *_: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(images), images.new_empty(num_images)


def _image_by_image(
    boxes: Tensor,
    scores: Tensor,
    images: Tensor,
    classes: Tensor,
    num_images: int,
    num_classes: int,
    iou: float,
) -> tuple[Tensor, Tensor]:
    """The operation by torchvision's NMS.

    Returns:
        int64 ``[R]``, the rows of the boxes that remain, image after image and best score first,
        filled up with R; and int64 ``[N]``, how many remain of each image.
    """
    rows = _rows_by_image(boxes, scores, images, classes, num_images, iou)
    counts = [len(own) for own in rows]
    none = len(images)
    filled = torch.cat([*rows, images.new_full((none - sum(counts),), none)])
    return filled, torch.tensor(counts, dtype=torch.int64, device=images.device)


def _on_gpu(boxes: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    has_triton = gpu_kernels.has_triton(boxes.device)
    return (nms_at_once if has_triton else _image_by_image)(boxes, *arguments)


def _rows_by_image(
    boxes: Tensor, scores: Tensor, images: Tensor, classes: Tensor, num_images: int, iou: float
) -> list[Tensor]:
    # One call for all images would shift boxes by up to N * K image sizes, where float32 loses
    # fractions of a pixel, and would compare boxes of different images.
    return [
        own[grouped_nms(boxes[own], scores[own], classes[own], iou)]
        for own in indices_by_group(images, num_images + 1)[:-1]
    ]


torch.library.define(
    _OPERATION,
    "(Tensor boxes, Tensor scores, Tensor images, Tensor classes, int num_images, int num_classes,"
    " float iou) -> (Tensor, Tensor)",
)
torch.library.impl(_OPERATION, "default", _image_by_image)
torch.library.impl(_OPERATION, "cuda", _on_gpu)
torch.library.register_fake(_OPERATION, _shapes)

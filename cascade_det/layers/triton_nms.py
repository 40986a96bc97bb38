"""NMS of many lists of boxes in one Triton kernel, a program per list.

Imports Triton: to be imported where a kernel is launched, see ``gpu_kernels.has_triton``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Boxes that are compared with as many others at a time.
TILE = 64
WARPS = 8


@triton.jit
def _corners(boxes: tl.tensor, rows: tl.tensor, inside: tl.tensor) -> tl.tuple:
    x0 = tl.load(boxes + rows * 4, mask=inside, other=0.0)
    y0 = tl.load(boxes + rows * 4 + 1, mask=inside, other=0.0)
    x1 = tl.load(boxes + rows * 4 + 2, mask=inside, other=0.0)
    y1 = tl.load(boxes + rows * 4 + 3, mask=inside, other=0.0)
    return x0, y0, x1, y1


@triton.jit
def _overlap(
    a0: tl.tensor,
    b0: tl.tensor,
    a1: tl.tensor,
    b1: tl.tensor,
    x0: tl.tensor,
    y0: tl.tensor,
    x1: tl.tensor,
    y1: tl.tensor,
    threshold: tl.tensor,
) -> tl.tuple:
    """Whether boxes (a, b), down, and (x, y), across, have a larger IoU; in torchvision's order."""
    width = tl.minimum(a1[:, None], x1[None, :]) - tl.maximum(a0[:, None], x0[None, :])
    height = tl.minimum(b1[:, None], y1[None, :]) - tl.maximum(b0[:, None], y0[None, :])
    common = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    areas = ((a1 - a0) * (b1 - b0))[:, None] + ((x1 - x0) * (y1 - y0))[None, :]
    union = areas - common
    # Two empty boxes have 0 / 0, which is not larger. In float32 "/" alone is an approximation.
    iou = tl.div_rn(common, union) if common.dtype == tl.float32 else common / union
    return iou > threshold


@triton.jit
def nms_kernel(
    boxes: tl.tensor, starts: tl.tensor, keep: tl.tensor, threshold: tl.tensor, TILE: tl.constexpr
) -> None:
    """The list of one program: ``keep`` of rows ``starts[p]`` to ``starts[p + 1]``."""
    first = tl.load(starts + tl.program_id(0))
    end = tl.load(starts + tl.program_id(0) + 1)
    lane = tl.arange(0, TILE)
    for start in range(first, end, TILE):
        rows = start + lane
        inside = rows < end
        x0, y0, x1, y1 = _corners(boxes, rows, inside)
        alive = inside.to(tl.int32)
        # Better tiles are decided already: what they keep covers boxes of this one.
        for before in range(first, start, TILE):
            better = before + lane
            a0, b0, a1, b1 = _corners(boxes, better, better < end)
            kept = tl.load(keep + better).to(tl.int32)
            covers = _overlap(a0, b0, a1, b1, x0, y0, x1, y1, threshold)
            alive = alive * (1 - tl.max(covers.to(tl.int32) * kept[:, None], axis=0))
        # Within the tile: a box is right once all better ones are, so that this ends, usually
        # after a few rounds.
        covers = _overlap(x0, y0, x1, y1, x0, y0, x1, y1, threshold)
        covers = (covers & (lane[:, None] < lane[None, :])).to(tl.int32)
        result = alive
        changes = 1
        while changes > 0:
            again = alive * (1 - tl.max(covers * result[:, None], axis=0))
            changes = tl.sum((again != result).to(tl.int32), axis=0)
            result = again
        tl.store(keep + rows, result.to(tl.int8), mask=inside)
        tl.debug_barrier()  # other threads of the program read it


def nms_of_lists(boxes: Tensor, starts: Tensor, iou: float) -> Tensor:
    """Which boxes of sorted lists remain, without a wait for the device.

    Args:
        boxes: float32 or float64 ``[R, 4]``, XYXY, list after list, each best first.
        starts: int64 ``[lists + 1]``, rows where the lists begin, and the end of the last.
        iou: boxes that overlap a better one that remains by more are dropped; in float32.

    Returns:
        Bool ``[R]``; ``False`` for rows outside of the lists.
    """
    keep = torch.zeros(len(boxes), dtype=torch.int8, device=boxes.device)
    if len(boxes) and len(starts) > 1:
        with torch.cuda.device_of(boxes):
            # Without fused multiply-add, so that the decisions are those of a CPU.
            nms_kernel[(len(starts) - 1,)](
                boxes.contiguous(),
                starts,
                keep,
                _float32_below(iou),
                TILE=TILE,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
    return keep.bool()


def _float32_below(value: float) -> float:
    """The largest float32 up to ``value``, which every float32 exceeds that exceeds ``value``."""
    rounded = torch.tensor(value, dtype=torch.float32)
    if rounded.item() > value:
        rounded = torch.nextafter(rounded, torch.tensor(-torch.inf))
    return float(rounded.item())

"""Mask heads for inference: channels-last, in a chosen dtype, a few regions at a time.

Shapes: R regions, C channels, P bins per side of a crop, M = 2 P cells per side of a mask.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from math import ceil, isqrt, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.core.mask_head import pixel_logits
from cascade_det.layers.conv_norm import ConvNorm
from cascade_det.layers.folding import fold_norms
from cascade_det.layers.winograd import MAX_CHANNELS, min_channels
from cascade_det.layers.winograd_crops import convolve_crops, memory_shapes
from cascade_det.layers.winograd_kernel import transform_weight
from cascade_det.layers.workers import run_in_threads, workspace

logger = logging.getLogger(__name__)

# Of the upsampled maps of one piece of work: the next layer should find them in the cache.
_PIECE_BYTES = 8 * 2**20


class FastMaskHead(nn.Module):
    """The layers of a mask head on channels-last crops, with weights of its own.

    The ``bags`` kernel writes crops in this layout, so no permutation is needed. On CPUs each
    thread computes all layers of a few regions at a time, and wide float32 convolutions are
    Winograd's. Logits are float32 for every ``dtype``.

    Args:
        convs: 3x3 convolutions with stride and padding 1, each with its norm, or ``None``, as
            ``norm``.
        deconv: 2x2 with stride 2.
        predictor: 1x1, to K masks or to 1 for all classes.
        dtype: of the computation.
    """

    def __init__(
        self,
        convs: Sequence[nn.Conv2d],
        deconv: nn.ConvTranspose2d,
        predictor: nn.Conv2d,
        *,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self._convs = [_copy_of(conv) for conv in convs]
        self.convs = nn.ModuleList(self._convs).eval()
        fold_norms(self.convs)
        self.upsample = _as_linear(deconv)
        self.predictor = copy.deepcopy(predictor)
        widths = {deconv.in_channels, *(conv.in_channels for conv in convs)}
        self.in_channels = convs[0].in_channels if convs else deconv.in_channels
        self._most_channels = max(widths)
        self._has_winograd = (
            dtype == torch.float32
            and deconv.weight.device.type == "cpu"
            and min(widths) >= min_channels()
            and max(widths) <= MAX_CHANNELS
        )
        if self._has_winograd:
            self.transformed = [transform_weight(conv.weight) for conv in self._convs]
        self.to(dtype).to(memory_format=torch.channels_last).requires_grad_(False)

    def forward(self, pooled: Tensor, classes: Tensor) -> Tensor:
        """``[R, C, P, P]`` and int64 ``[R]`` to float32 logits ``[R, M, M]``."""
        return self.forward_rows(pooled.permute(0, 2, 3, 1).flatten(1), classes)

    def forward_rows(self, rows: Tensor, classes: Tensor) -> Tensor:
        """``[R, P * P * C]`` from ``RoIPooler.pool_rows`` to float32 logits ``[R, M, M]``."""
        regions, size = len(rows), isqrt(rows.shape[1] // self.in_channels)
        maps = rows.view(regions, size, size, self.in_channels)
        if not _goes_in_pieces(rows):
            return self._logits(self._convolve(maps), classes)
        upsampled = regions * size**2 * self.upsample.out_features * self.dtype.itemsize
        threads = torch.get_num_threads()
        most = ceil(regions / (ceil(upsampled / _PIECE_BYTES / threads) * threads))
        starts = range(0, regions, most)
        remaining = iter(starts)
        logits = rows.new_empty(regions, 2 * size, 2 * size, dtype=torch.float32)
        convolve = self._convolve_by_winograd if self._has_winograd else self._convolve

        def work() -> None:
            for start in remaining:
                some = slice(start, start + most)
                logits[some] = self._logits(convolve(maps[some]), classes[some])

        run_in_threads(work, len(starts))
        return logits

    def _convolve(self, maps: Tensor) -> Tensor:
        """``[R, P, P, C]`` to what enters the deconvolution, in the same layout."""
        x = maps.to(self.dtype).permute(0, 3, 1, 2)
        for conv in self._convs:
            x = F.relu(conv(x), inplace=not torch.is_grad_enabled())
        return x.permute(0, 2, 3, 1)

    def _convolve_by_winograd(self, maps: Tensor) -> Tensor:
        regions, size, _, channels = maps.shape
        widest = self._most_channels
        largest = size * size * regions * widest
        scratch = sum(map(prod, memory_shapes(size, regions, widest, widest)))
        kept, memory = workspace(largest + scratch, self.dtype).split([largest, scratch])

        def crops(channels: int) -> Tensor:
            shape = size, size, regions, channels
            return kept[: prod(shape)].view(shape)

        x = crops(channels).copy_(maps.permute(2, 1, 0, 3))
        for conv, transformed in zip(self._convs, self.transformed, strict=True):
            out = crops(conv.out_channels)
            convolve_crops(x, transformed, conv.bias, out, memory)
            if conv.norm is not None:
                out.copy_(conv.norm(out.permute(2, 3, 1, 0)).permute(3, 2, 0, 1))
            x = out.relu_()
        return x.permute(2, 1, 0, 3)

    def _logits(self, x: Tensor, classes: Tensor) -> Tensor:
        """Logits ``[R, M, M]`` from ``[R, P, P, C]``."""
        regions, size, _, _ = x.shape
        # Flat: PyTorch multiplies maps of another layout image by image.
        x = F.relu(self.upsample(x.flatten(0, 2)), inplace=not torch.is_grad_enabled())
        pixels = x.view(regions, 4 * size**2, self.predictor.in_channels)
        cells = pixel_logits(self.predictor, pixels, classes)  # [R, P * P * 4]
        cells = cells.view(regions, size, size, 2, 2).transpose(2, 3)
        return cells.reshape(regions, 2 * size, 2 * size)


def fast_mask_heads(heads: Iterable[nn.Module], *, dtype: torch.dtype) -> nn.ModuleList:
    """Faster mask heads with the same output, for inference only; ``heads`` stay unchanged.

    A head qualifies if it computes no more than its layers, which are those of
    ``ConvUpsampleMaskHead`` or of Detectron2's ``MaskRCNNConvUpsampleHead``, under their names. All
    others stay as they are.

    Args:
        heads: ``[R, C, P, P]`` and classes ``[R]`` to logits ``[R, M, M]``.
        dtype: of the computation.
    """
    return nn.ModuleList(_fast(head, dtype) for head in heads)


def _fast(head: nn.Module, dtype: torch.dtype) -> nn.Module:
    parts = {name.rpartition(".")[2]: module for name, module in head.named_modules()}
    convs: list[Any] = []
    while (name := f"mask_fcn{len(convs) + 1}") in parts:
        convs.append(parts[name])
    deconv, predictor = parts.get("deconv"), parts.get("predictor")
    if (
        isinstance(deconv, nn.ConvTranspose2d)
        and isinstance(predictor, nn.Conv2d)
        and all(isinstance(conv, nn.Conv2d) for conv in convs)
    ):
        kernels = [layer.kernel_size for layer in (*convs, deconv, predictor)]
        if kernels == [(3, 3)] * len(convs) + [(2, 2), (1, 1)]:
            fast = FastMaskHead(convs, deconv, predictor, dtype=torch.float32)
            if _compute_the_same(head, fast, predictor.out_channels - 1):
                is_float32 = dtype == torch.float32
                return fast if is_float32 else FastMaskHead(convs, deconv, predictor, dtype=dtype)
    logger.warning("A mask head stays as it is: it has other layers than Mask R-CNN's.")
    return head


@torch.no_grad()
def _compute_the_same(head: nn.Module, fast: FastMaskHead, last: int) -> bool:
    """Whether ``head`` computes what its layers do, on one crop of class ``last``."""
    like = next(head.parameters())
    shape = 1, fast.in_channels, 4, 4
    pooled = torch.linspace(-1, 1, prod(shape), dtype=like.dtype, device=like.device).view(shape)
    classes = torch.tensor([last], device=like.device)
    try:
        expected = head(pooled, classes).float()
    except RuntimeError:  # of other shapes
        return False
    logits = fast(pooled, classes)
    if logits.shape != expected.shape:
        return False
    return bool((logits - expected).abs().max() <= 1e-3 * expected.abs().max())


def _goes_in_pieces(rows: Tensor) -> bool:
    needs_graph = torch.is_grad_enabled() and rows.requires_grad
    return rows.device.type == "cpu" and len(rows) > 0 and not needs_graph


def _copy_of(conv: nn.Conv2d) -> ConvNorm:
    with torch.device("meta"):  # draws no random numbers
        own = ConvNorm(conv.in_channels, conv.out_channels, 3)
    own.weight, own.bias = _copied(conv.weight), None if conv.bias is None else _copied(conv.bias)
    own.norm = copy.deepcopy(getattr(conv, "norm", None))
    return own


def _as_linear(deconv: nn.ConvTranspose2d) -> nn.Linear:
    """``[..., C]`` of each pixel to ``[..., 4 K]``: K channels of each of its 2 x 2 cells."""
    with torch.device("meta"):
        linear = nn.Linear(
            deconv.in_channels, 4 * deconv.out_channels, bias=deconv.bias is not None
        )
    linear.weight = _copied(deconv.weight.permute(2, 3, 1, 0).flatten(0, 2))
    bias = deconv.bias
    linear.register_parameter("bias", None if bias is None else _copied(bias.repeat(4)))
    return linear


def _copied(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(), requires_grad=False)

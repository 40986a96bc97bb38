"""Convolution with its norm as a child, under Detectron2's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops.misc import FrozenBatchNorm2d as _FrozenBatchNorm2d

from cascade_det.layers.cudnn_fused import fused_relu
from cascade_det.layers.training_conv import training_conv2d


class FrozenBatchNorm2d(_FrozenBatchNorm2d):
    """torchvision's frozen batch norm by the fused kernel: one pass, bit-equal to Detectron2's."""

    _factors: tuple[list[tuple[Tensor, int]], Tensor, Tensor] | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """``(scale, shift)``, each ``[C]``: the norm is ``scale * x + shift``.

        Computed again only after a change of the statistics: of the operations of a training step
        on a GPU these would be one in seven.
        """
        buffers = (self.weight, self.bias, self.running_mean, self.running_var)
        now = [(buffer, buffer._version) for buffer in buffers]
        if self._factors is None or not all(
            old is new and before == after
            for (old, before), (new, after) in zip(self._factors[0], now, strict=True)
        ):
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            self._factors = now, scale, self.bias - self.running_mean * scale
        return self._factors[1:]

    def __getstate__(self) -> dict[str, Any]:
        # A copy's statistics count their changes from the start.
        return {name: x for name, x in self.__dict__.items() if name != "_factors"}

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` normalised by the stored statistics."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with 32 groups (arXiv 1803.08494)."""
    return nn.GroupNorm(32, channels)


NORMS: dict[str, Callable[..., nn.Module]] = {
    "FrozenBN": FrozenBatchNorm2d,
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "GN": group_norm,
}


def make_norm(name: str, channels: int) -> nn.Module | None:
    """The norm layer called ``name``; ``""`` is none.

    Raises:
        ValueError: for a name that is not in ``NORMS``.
    """
    if name == "":
        return None
    if name not in NORMS:
        raise ValueError(f"unknown norm {name!r}; known: {', '.join(NORMS)}")
    return NORMS[name](channels)


class ConvNorm(nn.Conv2d):
    """A convolution and its norm, the child ``norm``, or ``None``.

    As a child the norm has Detectron2's state-dict names: ``conv1.weight``,
    ``conv1.norm.weight``. A convolution with a norm has no bias.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the kernel; padding keeps the size at stride 1.
        stride: in both directions.
        groups: groups of channels.
        norm: see ``make_norm``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        norm: str = "",
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=norm == "",
        )
        self.norm = make_norm(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, H / stride, W / stride]``."""
        if not (self.training and torch.is_grad_enabled()):
            x = super().forward(x)
            return x if self.norm is None else self.norm(x)
        weight, bias, norm = self.weight, self.bias, self.norm
        if isinstance(norm, FrozenBatchNorm2d):
            # Folded: equal up to rounding, without a pass over the map and a copy of it.
            scale, bias = norm.factors()
            weight = weight * scale.view(-1, 1, 1, 1)
            norm = None
        x = training_conv2d(
            x,
            weight,
            bias,
            stride=self.stride[0],
            padding=self.kernel_size[0] // 2,
            groups=self.groups,
        )
        return x if norm is None else norm(x)


def may_write_in_place(maps: Tensor) -> bool:
    """Whether operations may overwrite ``maps [N, C, H, W]`` that are not read later.

    Only channels-last maps; not with gradients, which may need them, nor while tracing.
    """
    return not (
        torch.is_grad_enabled() or torch.jit.is_tracing() or torch.compiler.is_compiling()
    ) and maps.is_contiguous(memory_format=torch.channels_last)


def convolved_relu(x: Tensor, conv: nn.Module) -> Tensor:
    """``relu(conv(x))``; one call of cuDNN where possible, with the same numbers up to rounding."""
    if type(conv) is nn.Conv2d or (type(conv) is ConvNorm and conv.norm is None):
        fused = fused_relu(x, conv)
        if fused is not None:
            return fused
    return F.relu_(conv(x))


def add_convolved(shortcut: Tensor, x: Tensor, conv: ConvNorm) -> Tensor:
    """``relu(shortcut + conv(x))``, the end of a residual block.

    One pass of oneDNN in place of ``shortcut`` where possible, with the same numbers in float32; in
    bfloat16 the sum is rounded once. On GPUs one call of cuDNN where possible.

    Args:
        shortcut: ``[N, K, H, W]``; may be overwritten.
        x: ``[N, C, H', W']``.
        conv: maps ``x`` to the shape of ``shortcut``.
    """
    if not _is_fusible(shortcut, x, conv):
        fused = None
        if type(conv) is ConvNorm and conv.norm is None:
            fused = fused_relu(x, conv, shortcut)
        return F.relu_(conv(x).add_(shortcut)) if fused is None else fused
    result: Tensor = torch.ops.mkldnn._convolution_pointwise_.binary(
        shortcut,
        x,
        conv.weight,
        conv.bias,
        list(conv.padding),
        list(conv.stride),
        list(conv.dilation),
        conv.groups,
        "add",
        1.0,
        "relu",
        [],
        "",
    )
    return result


def _is_fusible(shortcut: Tensor, x: Tensor, conv: nn.Module) -> bool:
    return (
        type(conv) is ConvNorm
        and conv.norm is None
        and {shortcut.dtype, x.dtype} == {conv.weight.dtype}
        and _has_onednn(conv.weight.dtype)
        and shortcut.device.type == "cpu"
        and may_write_in_place(shortcut)
    )


def _has_onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_convolution_pointwise_"):
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def freeze(module: nn.Module) -> None:
    """Freeze a part: its parameters need no gradients, its batch norms become frozen ones."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for child in list(module.modules()):
        for name, grandchild in child.named_children():
            if isinstance(grandchild, nn.modules.batchnorm._BatchNorm):
                setattr(child, name, _as_frozen(grandchild))


def _as_frozen(norm: nn.modules.batchnorm._BatchNorm) -> FrozenBatchNorm2d:
    frozen = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
    state = {k: v for k, v in norm.state_dict().items() if k != "num_batches_tracked"}
    frozen.load_state_dict(state)
    return frozen.to(next(iter(state.values()), torch.empty(0)).device)

"""Residual blocks in 8 bits, for inference."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from cascade_det.layers.int8 import Grid, Int8Conv2d, QuantisedMap, quantise_map

# The grid of what a module returns, or of the ReLU of that.
GridOf = Callable[[nn.Module, bool], Grid]


class Int8Block(nn.Module):
    """A residual block: convolutions with ReLUs, a shortcut, and the ReLU of their sum.

    Args:
        block: with ``conv1``, ``conv2``, perhaps ``conv3``, and ``shortcut``, all without norms.
        inputs: grid of the input.
        grid_of: gives the grids of maps inside the block, and of its output.
    """

    def __init__(self, block: nn.Module, inputs: Grid, grid_of: GridOf) -> None:
        super().__init__()
        *first, last = convolutions(block)
        self.inputs, self.output = inputs, grid_of(block, True)
        shortcut: Any = block.shortcut
        self.shortcut: Int8Conv2d | None = None
        if shortcut is not None:
            self.shortcut = Int8Conv2d(shortcut, inputs, output=grid_of(shortcut, False))
        self.convs = nn.ModuleList()
        for conv in first:
            output = grid_of(conv, True)
            self.convs.append(Int8Conv2d(conv, inputs, output=output, relu=True))
            inputs = output
        self.last = Int8Conv2d(last, inputs, output=self.output, relu=True)

    def forward(self, x: Tensor | QuantisedMap) -> QuantisedMap:
        """``[N, C, H, W]``, in 8 bits or not, to ``[N, K, H / stride, W / stride]``.

        May overwrite an input in 8 bits of the size of its output.
        """
        if isinstance(x, Tensor):
            x = quantise_map(x, self.inputs)
        out: Any = x
        for conv in self.convs:
            out = conv(out)
        shortcut: Any = x if self.shortcut is None else self.shortcut(x)
        return self.last.add_to(shortcut, out)


def convolutions(block: nn.Module) -> list[nn.Conv2d]:
    """The convolutions of a residual block beside its shortcut, in order."""
    names = ("conv1", "conv2", "conv3")
    return [getattr(block, name) for name in names if hasattr(block, name)]


def int8_stages(
    stages: Iterable[nn.Module], inputs: Grid, grid_of: GridOf
) -> list[tuple[nn.Module, Int8Block]]:
    """Blocks in 8 bits for all blocks of the stages of a ResNet, in order.

    Args:
        stages: each a sequence of residual blocks.
        inputs: grid of the input of the first.
        grid_of: see ``Int8Block``.

    Returns:
        Pairs of a block and its replacement.
    """
    replacements = []
    for block in (block for stage in stages for block in stage.children()):
        fast = Int8Block(block, inputs, grid_of)
        replacements.append((block, fast))
        inputs = fast.output
    return replacements

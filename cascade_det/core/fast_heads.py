"""Box heads for inference: in the memory layout of the pooling, and in a chosen dtype.

Shapes: R regions, C channels of the feature maps, P bins per side, F outputs of a box head.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from cascade_det.core.fast_masks import fast_mask_heads
from cascade_det.layers.int8 import Grid, Int8Linear
from cascade_det.layers.weight_versions import weight_versions

logger = logging.getLogger(__name__)


class FastBoxHead(nn.Module):
    """Linear layers whose first one reads channels-last crops.

    The ``bags`` kernel writes crops in this layout, so no permutation is needed. The output is
    float32 for every ``dtype``, and so are boxes and scores.

    Args:
        layers: modified in place; the first is ``nn.Linear(C * P * P, ...)`` over flattened
            ``[R, C, P, P]``.
        pooled_size: P.
        dtype: of the computation.
        grid: of the crops, for a first layer in 8 bits; ``None`` for one in ``dtype``.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        pooled_size: int,
        dtype: torch.dtype,
        grid: Grid | None = None,
    ) -> None:
        super().__init__()
        first = layers[0]
        assert isinstance(first, nn.Linear)
        self.dtype = dtype
        # [out, C * P * P] to [out, C, P * P] to [out, P * P * C]
        weight = first.weight.detach().unflatten(1, (-1, pooled_size**2)).transpose(1, 2)
        first.weight = nn.Parameter(weight.flatten(1), requires_grad=False)
        if grid is not None:
            layers = [Int8Linear(first, grid, output=dtype), *layers[1:]]
        self.layers = nn.Sequential(*layers).to(dtype).requires_grad_(False)

    def forward(self, pooled: Tensor) -> Tensor:
        """``[R, C, P, P]`` to float32 ``[R, F]``."""
        rows = pooled.flatten(2).transpose(1, 2).flatten(1)  # [R, P * P * C]
        return self.forward_rows(rows)

    def forward_rows(self, rows: Tensor) -> Tensor:
        """``[R, P * P * C]`` from ``RoIPooler.pool_rows`` to float32 ``[R, F]``."""
        return self.layers(rows.to(self.dtype)).float()


def fast_box_heads(
    heads: Iterable[nn.Module],
    *,
    pooled_size: int,
    dtype: torch.dtype,
    keep: bool = False,
    grids: Sequence[Grid] = (),
) -> nn.ModuleList:
    """Faster box heads with the same output, for inference only.

    A head qualifies if it is a sequence of ``nn.Flatten``, ``nn.Linear`` and row-wise layers, and
    its class does not override ``forward``. All others stay as they are.

    Args:
        heads: S modules, ``[R, C, P, P]`` to ``[R, F]``.
        pooled_size: P.
        dtype: of the computation.
        keep: copy the weights and leave ``heads`` unchanged.
        grids: of the crops of S heads, for first layers in 8 bits.

    Returns:
        S modules, in order.
    """
    heads = list(heads)
    of_heads: Sequence[Grid | None] = grids or [None] * len(heads)
    return nn.ModuleList(
        _fast(head, pooled_size, dtype, keep, grid)
        for head, grid in zip(heads, of_heads, strict=True)
    )


def common_dtype(heads: Iterable[nn.Module]) -> torch.dtype | None:
    """The dtype in which all heads read the features; ``None`` if they differ or one is plain."""
    dtypes = {head.dtype if isinstance(head, FastBoxHead) else None for head in heads}
    return dtypes.pop() if len(dtypes) == 1 else None


def head_dtypes(heads: Iterable[nn.Module]) -> list[torch.dtype]:
    """The dtypes that box heads compute in, each once: of their weights, in order of the heads."""
    modules = [module for head in heads for module in head.modules()]
    dtypes = [torch.int8 for module in modules if isinstance(module, Int8Linear)]
    dtypes += [p.dtype for module in modules for p in module.parameters(recurse=False)]
    return list(dict.fromkeys(dtypes))


def _fast(
    head: nn.Module, pooled_size: int, dtype: torch.dtype, keep: bool, grid: Grid | None
) -> nn.Module:
    layers = list(head.children())
    plain = (
        isinstance(head, nn.Sequential)
        and len(layers) > 1
        and isinstance(layers[0], nn.Flatten)
        and type(layers[1]) is nn.Linear
        and layers[1].in_features % pooled_size**2 == 0
        and _is_their_sequence(head, layers, pooled_size)
    )
    if not plain:
        logger.warning("A box head stays as it is: it has more than linear layers.")
        return head
    layers = layers[1:]
    return FastBoxHead(
        copy.deepcopy(layers) if keep else layers,
        pooled_size=pooled_size,
        dtype=dtype,
        grid=grid,
    )


@torch.no_grad()
def _is_their_sequence(head: nn.Module, layers: list[nn.Module], pooled_size: int) -> bool:
    """Whether ``forward`` returns what the layers return, on one crop."""
    weight = layers[1].weight
    assert isinstance(weight, Tensor)
    pooled = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    pooled = pooled.view(1, -1, pooled_size, pooled_size)  # [1, C, P, P]
    expected = pooled
    for layer in layers:
        expected = layer(expected)
    return torch.equal(head(pooled), expected)


class FastCopies:
    """Cached fast copies of heads, renewed when weights were loaded or replaced.

    A training step is not noticed: fused optimisers change weights without a new version. Threads
    may each make copies at first; one set stays.

    Args:
        pooled_size: P of the box heads.
        dtype: of the computation.
        device: of the heads.
        grids: see ``fast_box_heads``.
    """

    def __init__(
        self,
        *,
        pooled_size: int,
        dtype: torch.dtype,
        device: torch.device,
        grids: Sequence[Grid] = (),
    ) -> None:
        self.pooled_size = pooled_size
        self.dtype = dtype
        self.device = device
        self.grids = grids
        self._kept: dict[str, tuple[list[tuple[int, int, int]], nn.ModuleList]] = {}

    def get(self, heads: Collection[nn.Module]) -> nn.ModuleList:
        """Fast copies of box heads with their current weights."""
        size, dtype, grids = self.pooled_size, self.dtype, self.grids
        make = partial(fast_box_heads, pooled_size=size, dtype=dtype, keep=True, grids=grids)
        return self._current("box", heads, make)

    def get_masks(self, heads: Collection[nn.Module]) -> nn.ModuleList:
        """Fast copies of mask heads with their current weights."""
        return self._current("mask", heads, partial(fast_mask_heads, dtype=self.dtype))

    def _current(
        self,
        kind: str,
        heads: Collection[nn.Module],
        make: Callable[[Collection[nn.Module]], nn.ModuleList],
    ) -> nn.ModuleList:
        versions = weight_versions(heads)
        kept = self._kept.get(kind)
        if kept is None or kept[0] != versions:
            self._kept.pop(kind, None)  # free the old copies first
            kept = self._kept[kind] = versions, make(heads)
        return kept[1]

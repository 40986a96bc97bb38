"""Box heads as inference wants them: in the layout of the pooling, and in a type of one's choice.

Shapes: R regions, C channels of the feature maps, P bins per side, F outputs of a box head.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class FastBoxHead(nn.Module):
    """Linear layers over pooled regions, whose first one takes bins with their channels together.

    That is how the ``bags`` kernel writes them, so that nothing has to be moved in between. Boxes
    and scores stay float32: what comes out does, whatever the type inside.

    Args:
        layers: the first one ``nn.Linear(C * P * P, ...)`` over flattened ``[R, C, P, P]``. They
            are changed and kept.
        pooled_size: P.
        dtype: to compute in.
    """

    def __init__(
        self, layers: Sequence[nn.Module], *, pooled_size: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        first = layers[0]
        assert isinstance(first, nn.Linear)
        self.dtype = dtype
        weight = first.weight.detach().to(dtype).unflatten(1, (-1, pooled_size**2))
        first.weight = nn.Parameter(weight.transpose(1, 2).flatten(1), requires_grad=False)
        self.layers = nn.Sequential(*layers).to(dtype).requires_grad_(False)

    def forward(self, pooled: Tensor) -> Tensor:
        """``[R, C, P, P]`` to float32 ``[R, F]``."""
        return self.of_rows(pooled.flatten(2).transpose(1, 2).flatten(1))

    def of_rows(self, rows: Tensor) -> Tensor:
        """``[R, P * P * C]``, as ``RoIPooler.rows`` gives them, to float32 ``[R, F]``."""
        return self.layers(rows.to(self.dtype)).float()


def fast_box_heads(
    heads: Iterable[nn.Module], *, pooled_size: int, dtype: torch.dtype, keep: bool = False
) -> nn.ModuleList:
    """Box heads that compute the same faster; inference only.

    A head can be changed if it is a sequence of ``nn.Flatten``, ``nn.Linear`` and others that go
    row by row. Another, and one of a class whose ``forward`` does anything else, stays as it is.

    Args:
        heads: S modules, ``[R, C, P, P]`` to ``[R, F]``.
        pooled_size: P.
        dtype: to compute in.
        keep: leave ``heads`` as they are, at the price of a second set of weights.

    Returns:
        S modules, in their order.
    """
    return nn.ModuleList(_fast(head, pooled_size, dtype, keep) for head in heads)


def common_dtype(heads: Iterable[nn.Module]) -> torch.dtype | None:
    """What box heads all want their maps in; ``None``: some want the type that these have."""
    dtypes = {head.dtype if isinstance(head, FastBoxHead) else None for head in heads}
    return dtypes.pop() if len(dtypes) == 1 else None


def fast_dtype(heads: Iterable[nn.Module]) -> torch.dtype:
    """What box heads compute in, as far as they are fast ones; float32 where none is."""
    return next((head.dtype for head in heads if isinstance(head, FastBoxHead)), torch.float32)


def _fast(head: nn.Module, pooled_size: int, dtype: torch.dtype, keep: bool) -> nn.Module:
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
        logger.warning("A box head stays as it is: it is not linear layers alone.")
        return head
    layers = layers[1:]
    return FastBoxHead(
        copy.deepcopy(layers) if keep else layers, pooled_size=pooled_size, dtype=dtype
    )


@torch.no_grad()
def _is_their_sequence(head: nn.Module, layers: list[nn.Module], pooled_size: int) -> bool:
    """Whether ``forward``, which a class can write as it likes, gives what the layers give."""
    weight = layers[1].weight
    assert isinstance(weight, Tensor)
    pooled = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    pooled = pooled.view(1, -1, pooled_size, pooled_size)
    expected = pooled
    for layer in layers:
        expected = layer(expected)
    return torch.equal(head(pooled), expected)


class FastCopies:
    """Fast copies of box heads that are kept, made anew when weights were loaded or replaced.

    They do not notice a training: fused optimisers write weights without counting it. Threads that
    ask at once may each make copies, of which one stays.

    Args:
        pooled_size: P.
        dtype: to compute in.
        device: of the heads.
    """

    def __init__(self, *, pooled_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.pooled_size = pooled_size
        self.dtype = dtype
        self.device = device
        self._kept: tuple[list[tuple[int, int, int]], nn.ModuleList] | None = None

    def of(self, heads: Collection[nn.Module]) -> nn.ModuleList:
        """Copies of the heads as they are now."""
        parameters = [p for head in heads for p in head.parameters()]
        made_of = [(id(p), p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]
        kept = self._kept
        if kept is None or kept[0] != made_of:
            kept = self._kept = None  # frees the memory of the last ones first
            kept = (
                made_of,
                fast_box_heads(heads, pooled_size=self.pooled_size, dtype=self.dtype, keep=True),
            )
            self._kept = kept
        return kept[1]

"""What the parts of a detector compute and move, counted during a real call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cascade_det.core import PartTimer
from cascade_det.core.modes import evaluation_mode

_BAGS = (torch.ops.aten._embedding_bag, torch.ops.aten._embedding_bag_forward_only)


@dataclass(frozen=True)
class Work:
    """What a part computes and moves.

    Attributes:
        multiply_adds: of products, convolutions and embedding bags; other operations count 0.
        floats: floating-point numbers read or written, of any dtype.
        other_bytes: bytes of integers and booleans read or written.
    """

    multiply_adds: int = 0
    floats: int = 0
    other_bytes: int = 0

    def bytes_moved(self, dtype: torch.dtype) -> int:
        """Bytes read or written if floating-point numbers are of this dtype."""
        return self.floats * dtype.itemsize + self.other_bytes


def count_work(detector: nn.Module, batch: Sequence[Mapping[str, Any]]) -> dict[str, Work]:
    """Count what each part of a detector does for a batch.

    Args:
        detector: with ``detect(batch, timer=)``; not optimised, since compiled or rewritten layers
            cannot be counted.
        batch: see ``detect``.

    Returns:
        By the part names that the detector gives its timer, in order.
    """
    counter = PartCounter()
    model: Any = detector
    # Not inference mode, in which linear layers are not decomposed into products.
    with evaluation_mode(detector), torch.no_grad():
        model.detect(batch, timer=counter)
    return counter.work()


class PartCounter(PartTimer):
    """A timer that counts the work of parts instead of their milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self._multiply_adds: dict[str, int] = {}
        self._traffic = _Traffic()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the work inside the block as that of part ``name``."""
        self._traffic.part = name
        flops = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(_BAGS, _bag_flops))
        # The inner mode decomposes operations that the outer one would see whole. Fused attention
        # of a CPU would count 0.
        with self._traffic, flops, sdpa_kernel(SDPBackend.MATH):
            yield
        counted = flops.get_total_flops() // 2
        self._multiply_adds[name] = self._multiply_adds.get(name, 0) + counted

    def work(self) -> dict[str, Work]:
        """The work by part, in the order in which parts began."""
        work = {}
        for part, count in self._multiply_adds.items():
            moved = self._traffic.moved[part].values()
            work[part] = Work(
                count, sum(x.floats for x in moved), sum(x.other_bytes for x in moved)
            )
        return work


class _Traffic(TorchDispatchMode):
    """Which tensors cross the borders of parts: each is read once and written once.

    Tensors are identified by their storages. Weak references keep the addresses of freed storages
    from being reused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self._known: dict[int, StorageWeakRef] = {}
        self._maker: dict[int, str] = {}
        self.moved: dict[str, dict[int, Work]] = defaultdict(dict)  # by part and storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {self._key(tensor): tensor for tensor in _tensors((args, kwargs))}
        if not func.is_view:  # views move nothing
            for key, tensor in inputs.items():
                self._on_read(key, tensor, _touched(func, args, tensor))
        for tensor in _tensors(out):
            if (key := self._key(tensor)) not in inputs:
                self._maker.setdefault(key, self.part)
        return out

    def _on_read(self, key: int, tensor: Tensor, amount: Work) -> None:
        maker = self._maker.get(key)
        if maker == self.part:
            return
        self._keep_larger(self.part, key, amount)
        if maker is not None:
            self._keep_larger(maker, key, _all_of(tensor))

    def _keep_larger(self, part: str, key: int, amount: Work) -> None:
        amounts = self.moved[part]
        before = amounts.get(key, Work())
        if (amount.floats, amount.other_bytes) > (before.floats, before.other_bytes):
            amounts[key] = amount

    def _key(self, tensor: Tensor) -> int:
        reference = StorageWeakRef(tensor.untyped_storage())
        self._known.setdefault(reference.cdata, reference)
        return int(reference.cdata)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _touched(func: Any, args: Sequence[Any], tensor: Tensor) -> Work:
    """Embedding bags read only the rows of their table that the index names."""
    if func.overloadpacket in _BAGS and tensor is args[0]:
        return Work(floats=len(args[1].unique()) * tensor.shape[1])
    return _all_of(tensor)


def _all_of(tensor: Tensor) -> Work:
    # Expanded tensors have more elements than their storage.
    count = min(tensor.numel(), tensor.untyped_storage().nbytes() // tensor.itemsize)
    if tensor.is_floating_point():
        return Work(floats=count)
    return Work(other_bytes=count * tensor.itemsize)


def _bag_flops(table: torch.Size, index: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * index[0] * table[1]

"""What the parts of a detector compute and move, counted during a real call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cascade_det.core.modes import evaluation_mode
from cascade_det.core.structures import PartTimer

_BAGS = (torch.ops.aten._embedding_bag, torch.ops.aten._embedding_bag_forward_only)


@dataclass(frozen=True)
class Work:
    """What a part computes and moves.

    Attributes:
        multiply_adds: of products, convolutions and bags; other operations count nothing.
        floats: floating-point numbers that are read or written, whatever their type.
        other_bytes: of integers and booleans that are.
    """

    multiply_adds: int = 0
    floats: int = 0
    other_bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.multiply_adds + other.multiply_adds,
            self.floats + other.floats,
            self.other_bytes + other.other_bytes,
        )

    def bytes_moved(self, dtype: torch.dtype) -> int:
        """Bytes, if its floating-point numbers are of this type."""
        return self.floats * dtype.itemsize + self.other_bytes


def count_work(detector: nn.Module, batch: Sequence[Mapping[str, Any]]) -> dict[str, Work]:
    """What each part of a detector does for a batch, counted during a real call.

    Args:
        detector: has ``detect(batch, timer=)``; as it was built, since what was compiled or
            rewritten to multiply less cannot be counted.
        batch: see ``detect``.

    Returns:
        by the names that the detector gives its timer, in order.
    """
    counter = PartCounter()
    model: Any = detector
    # Not inference mode: linear layers would not be taken apart into products.
    with evaluation_mode(detector), torch.no_grad():
        model.detect(batch, timer=counter)
    return counter.work()


class PartCounter(PartTimer):
    """Counts what parts do, where a timer would take their milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self._multiply_adds: dict[str, int] = {}
        self._traffic = _Traffic()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is computed and moved inside the block as that of part ``name``."""
        self._traffic.part = name
        flops = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(_BAGS, _bag_flops))
        # The counter is the inner one: it takes apart what the other would see whole.
        with self._traffic, flops:
            yield
        counted = flops.get_total_flops() // 2
        self._multiply_adds[name] = self._multiply_adds.get(name, 0) + counted

    def work(self) -> dict[str, Work]:
        """By part, in the order in which they began."""
        moved = self._traffic.moved()
        return {
            part: replace(moved.get(part, Work()), multiply_adds=count)
            for part, count in self._multiply_adds.items()
        }


class _Traffic(TorchDispatchMode):
    """Which tensors cross the borders of parts: each counts once where it is read and written.

    Tensors are told apart by their storages. What was freed is remembered by a weak reference, so
    that no other storage gets its address.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self._known: dict[int, StorageWeakRef] = {}
        self._maker: dict[int, str] = {}
        self._read: dict[str, dict[int, Work]] = {}
        self._written: dict[str, dict[int, Work]] = {}

    def moved(self) -> dict[str, Work]:
        """By part, multiply-adds left out."""
        parts = self._read.keys() | self._written.keys()
        return {
            part: sum(
                (*self._read.get(part, {}).values(), *self._written.get(part, {}).values()), Work()
            )
            for part in parts
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {self._key(tensor): tensor for tensor in _tensors((args, kwargs))}
        # A view touches no number.
        if not func.is_view:
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
        _keep_larger(self._read.setdefault(self.part, {}), key, amount)
        if maker is not None:
            _keep_larger(self._written.setdefault(maker, {}), key, _all_of(tensor))

    def _key(self, tensor: Tensor) -> int:
        reference = StorageWeakRef(tensor.untyped_storage())
        self._known.setdefault(reference.cdata, reference)
        return int(reference.cdata)


def _keep_larger(amounts: dict[int, Work], key: int, amount: Work) -> None:
    before = amounts.get(key, Work())
    if (amount.floats, amount.other_bytes) > (before.floats, before.other_bytes):
        amounts[key] = amount


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _touched(func: Any, args: Sequence[Any], tensor: Tensor) -> Work:
    """Of a table, bags read the rows that they name."""
    if func.overloadpacket in _BAGS and tensor is args[0]:
        return Work(floats=len(args[1].unique()) * tensor.shape[1])
    return _all_of(tensor)


def _all_of(tensor: Tensor) -> Work:
    # An expanded tensor has fewer numbers than elements.
    count = min(tensor.numel(), tensor.untyped_storage().nbytes() // tensor.itemsize)
    if tensor.is_floating_point():
        return Work(floats=count)
    return Work(other_bytes=count * tensor.itemsize)


def _bag_flops(table: torch.Size, index: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * index[0] * table[1]

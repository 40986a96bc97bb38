"""Puts modules into evaluation mode for the length of a call, also with threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import Lock
from typing import Concatenate, ParamSpec, TypeVar

from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class _Block:
    """Modules that were in training mode, and the number of calls that use them now."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.calls = 0


_LOCK = Lock()
_BLOCK_OF: dict[nn.Module, _Block] = {}


@contextmanager
def evaluation_mode(*parts: nn.Module) -> Iterator[None]:
    """Put all modules into evaluation mode inside the block, and back afterwards.

    Threads may share modules: the first call switches and the last one switches back. Modules
    that are in evaluation mode already are not touched.
    """
    with _LOCK:
        blocks = _enter(parts)
    try:
        yield
    finally:
        if blocks:
            with _LOCK:
                _leave(blocks)


def _enter(parts: tuple[nn.Module, ...]) -> set[_Block]:
    """Switch to evaluation mode; returns the blocks that wait for the end of this call."""
    # Module by module: a part frozen in evaluation mode stays frozen afterwards.
    modules = [module for part in parts for module in part.modules()]
    blocks = {_BLOCK_OF[module] for module in modules if module in _BLOCK_OF}
    training = [module for module in modules if module.training]
    if training:
        for part in parts:
            part.eval()
        block = _Block(training)
        _BLOCK_OF.update(dict.fromkeys(training, block))
        blocks.add(block)
    for block in blocks:
        block.calls += 1
    return blocks


def _leave(blocks: set[_Block]) -> None:
    for block in blocks:
        block.calls -= 1
        if block.calls:
            continue
        for module in block.modules:
            module.training = True
            if _BLOCK_OF.get(module) is block:
                del _BLOCK_OF[module]


def in_evaluation_mode(
    method: Callable[Concatenate[_Module, _Arguments], _Result],
) -> Callable[Concatenate[_Module, _Arguments], _Result]:
    """Run a method of a module in evaluation mode, without batch statistics and dropout."""

    @wraps(method)
    def call(self: _Module, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with evaluation_mode(self):
            return method(self, *args, **kwargs)

    return call

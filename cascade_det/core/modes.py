"""Modules that are in evaluation mode for a while."""

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
    """Modules that were in training, and how many calls need them in evaluation mode."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.calls = 0


_LOCK = Lock()
_BLOCK_OF: dict[nn.Module, _Block] = {}


@contextmanager
def evaluation_mode(*parts: nn.Module) -> Iterator[None]:
    """Within the block all modules are in evaluation mode; afterwards in the mode of before.

    Threads can share them: the first one switches, and the last one switches back. Where all are
    in evaluation mode already, nothing is written.
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
    """Switch to evaluation mode; whose switching back has to wait for this call."""
    # Module by module: what is frozen in evaluation mode inside a training model stays so.
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
    """Let a method of a module run in evaluation mode, whatever mode the module is in.

    A norm would else take its statistics from what is detected, and a dropout drop some of it.
    """

    @wraps(method)
    def call(self: _Module, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with evaluation_mode(self):
            return method(self, *args, **kwargs)

    return call

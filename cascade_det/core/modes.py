"""Modules that are in evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@contextmanager
def evaluation_mode(*parts: nn.Module) -> Iterator[None]:
    """Within the block all modules are in evaluation mode; afterwards in the mode of before.

    Where all are in evaluation mode already, nothing is written, so that threads can share them.
    """
    # Module by module: what is frozen in evaluation mode inside a training model stays so.
    training = [module for part in parts for module in part.modules() if module.training]
    if not training:
        yield
        return
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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

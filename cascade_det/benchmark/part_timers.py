"""Part times of models that take no ``PartTimer``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from cascade_det.core import PartTimer

# Owner of a function, its attribute name, and the part that starts when it is called; a callable
# computes the part from the arguments of the call.
PartStart = tuple[Any, str, str | Callable[..., str]]


@contextmanager
def time_parts(timer: PartTimer, starts: Sequence[PartStart]) -> Iterator[None]:
    """Time parts inside the block: each ends where the next one starts.

    Args:
        timer: gets the milliseconds.
        starts: the functions whose calls start a part; patched inside the block.
    """
    with ExitStack() as patches, ExitStack() as current:

        def starting(function: Callable[..., Any], part: Any) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                current.close()
                name = part if isinstance(part, str) else part(*args, **kwargs)
                current.enter_context(timer.part(name))
                return function(*args, **kwargs)

            return call

        for owner, name, part in starts:
            patched = starting(getattr(owner, name), part)
            patches.enter_context(mock.patch.object(owner, name, patched))
        yield

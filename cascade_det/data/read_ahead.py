"""Prepares the next items in a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def read_ahead(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """``map(function, items)`` in a thread, one item ahead of the caller.

    This helps if the function releases the GIL, as reading, decoding and resizing do. An error of
    the function is raised in place of its result. A caller that stops early leaves at most one
    result unused.
    """
    waiting: Future[_Result] | None = None
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        for item in items:
            current, waiting = waiting, pool.submit(function, item)
            if current is not None:
                yield current.result()
        if waiting is not None:
            yield waiting.result()
    finally:
        pool.shutdown(cancel_futures=True)

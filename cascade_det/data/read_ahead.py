"""Prepares the next items in a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def read_ahead(
    function: Callable[[_Item], _Result], items: Iterable[_Item], *, ahead: int = 1
) -> Iterator[_Result]:
    """``map(function, items)`` in a thread, ``ahead`` items before the caller.

    This helps if the function releases the GIL, as reading, decoding and resizing do. An error of
    the function is raised in place of its result. A caller that stops early leaves at most
    ``ahead`` results unused.
    """
    waiting: deque[Future[_Result]] = deque()
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)

"""Work on what comes next while something else is computed."""

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
    """``map(function, items)`` in a thread that is ``ahead`` items further than the caller.

    That pays where the function lets other threads run, as reading, decoding and resizing do. An
    error of the function is raised where its result would come. A caller that stops early leaves
    at most ``ahead`` results unused.
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

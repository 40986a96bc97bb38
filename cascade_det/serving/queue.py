"""One request after another in a thread of its own, and a limit to how many wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, ParamSpec, TypeVar

from cascade_det.serving.uploads import UploadError

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class BoundedQueue(Generic[_Arguments, _Result]):
    """Calls a function in one thread, first come first served; for one event loop.

    Args:
        function: runs in the thread.
        most_waiting: requests that may wait while one runs.
    """

    def __init__(self, function: Callable[_Arguments, _Result], most_waiting: int) -> None:
        self._function = function
        self._most, self._taken = most_waiting + 1, 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="detection")

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place in the queue, from before the body of a request is read.

        Raises:
            UploadError: all places are taken.
        """
        if self._taken >= self._most:
            raise UploadError(503, "Too many images are waiting. Try again in a moment.")
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1

    def submit(
        self, *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> asyncio.Future[_Result]:
        """Call the function; cancelling the result drops a call that has not begun."""
        return asyncio.wrap_future(self._thread.submit(self._function, *args, **kwargs))

    def close(self) -> None:
        """End the thread after the call that runs; those that wait are cancelled."""
        self._thread.shutdown(cancel_futures=True)

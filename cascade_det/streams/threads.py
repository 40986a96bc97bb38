"""Steps of a pipeline in threads of their own, with bounded queues between them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from queue import Empty, Full, Queue
from typing import Any, Generic, TypeVar

_Item = TypeVar("_Item")
_LOOK = 0.1  # seconds between two looks whether to stop
_LONGEST_END = 2.0  # seconds for a thread that waits for a camera or a server


class Background(Generic[_Item]):
    """Iterates in a thread, at most ``ahead`` items before the caller; a context manager.

    An error of the iteration is raised in place of the next item. Leaving the block ends the
    thread after its current item.

    Args:
        items: ``None`` among them is left out: it only lets the thread look whether to stop.
        ahead: at least 1.
        newest: drop the oldest item instead of waiting, where items come faster than the caller
            takes them.

    Attributes:
        dropped: items that the caller never saw.
    """

    def __init__(self, items: Iterable[_Item | None], ahead: int, *, newest: bool = False) -> None:
        self._items, self._newest = items, newest
        self._queue: Queue[tuple[bool, Any]] = Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.dropped = 0

    def __enter__(self) -> Iterator[_Item]:
        self._thread.start()
        return self._taken()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(_LONGEST_END)

    def _taken(self) -> Iterator[_Item]:
        while True:
            more, item = self._queue.get()
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item

    def _run(self) -> None:
        end = None
        iterator = iter(self._items)
        try:
            for item in iterator:
                if self._stop.is_set():
                    break
                if item is not None:
                    self._put((True, item))
        except BaseException as error:  # the caller's, whatever it is
            end = error
        finally:
            if hasattr(iterator, "close"):
                iterator.close()  # files and cameras, in the thread that uses them
        self._put((False, end))

    def _put(self, entry: tuple[bool, Any]) -> None:
        while not self._stop.is_set():
            if self._newest and entry[0] and self._queue.full():
                with suppress(Empty):
                    self._queue.get_nowait()
                    self.dropped += 1
            with suppress(Full):
                self._queue.put(entry, timeout=_LOOK)
                return


class Worker(Generic[_Item]):
    """Calls a function with items in order, in a thread; a context manager.

    At the end of the block all items are done. An error of the function is raised by the next
    ``put``, or at the end; items after it are dropped.

    Args:
        function: called with each item.
        ahead: items that may wait, at least 1.
    """

    def __init__(self, function: Callable[[_Item], object], ahead: int) -> None:
        self._function = function
        self._queue: Queue[tuple[bool, Any]] = Queue(ahead)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: BaseException | None = None

    def put(self, item: _Item) -> None:
        """Hand over an item, perhaps after waiting."""
        self._raise()
        self._queue.put((True, item))

    def __enter__(self) -> Worker[_Item]:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._queue.put((False, None))
        self._thread.join()
        if kind is None:
            self._raise()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        failed = False
        while True:
            more, item = self._queue.get()
            if not more:
                return
            if not failed:
                try:
                    self._function(item)
                except BaseException as error:  # of the caller's thread, whatever it is
                    self._error, failed = error, True

"""Ctrl-C, and the signal that clusters send before they take a machine away, as a question."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """Training ended because it was asked to, after a checkpoint."""


class InterruptRequest:
    """Whether someone asked to stop; true from the first signal on.

    Attributes:
        immediate: whether a signal is to end what runs at once, by a KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self._received = False
        self.immediate = False

    def __bool__(self) -> bool:
        return self._received

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: the first one is remembered, the second one ends everything at once.

        Raises:
            KeyboardInterrupt: it is the second one, or ``immediate`` is set.
        """
        if self._received or self.immediate:
            raise KeyboardInterrupt
        self._received = True
        logger.warning(
            "%s: stopping after this iteration, with a checkpoint (once more: at once)",
            signal.Signals(number).name,
        )


@contextmanager
def interrupt_request() -> Iterator[InterruptRequest]:
    """Within the block, Ctrl-C and SIGTERM are remembered instead of ending the process."""
    request = InterruptRequest()
    # Python hands signals to the main thread alone, and lets no other one ask for them.
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

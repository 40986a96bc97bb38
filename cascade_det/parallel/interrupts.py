"""Signals that interrupt a training: Ctrl-C, a lost terminal, a cluster's warning."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cascade_det.parallel import distributed
from cascade_det.parallel.processes import Interrupted
from cascade_det.parallel.signals import handled, let_go_of_lost_terminal, stop_signals

logger = logging.getLogger(__name__)


class InterruptRequest:
    """Whether a signal has asked to stop; true from the first one on.

    Attributes:
        immediate: whether the next signal raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self._received: set[int] = set()
        self.immediate = False

    def __bool__(self) -> bool:
        return bool(self._received)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: the first is remembered, a second Ctrl-C ends everything at once.

        Other signals may arrive several times for one request, to the process group and from the
        parent, so repeating them does not mean haste.

        Raises:
            KeyboardInterrupt: it is the second Ctrl-C, or ``immediate`` is set.
        """
        if number == signal.SIGHUP:
            let_go_of_lost_terminal()
        first, again = not self._received, number in self._received
        self._received.add(number)
        if self.immediate or (again and number == signal.SIGINT):
            # Only once: the interrupted work saves before it ends.
            self.immediate = False
            raise KeyboardInterrupt
        if first:
            logger.warning(
                "%s: stopping after this iteration, with a checkpoint (a second Ctrl-C: at once)",
                signal.Signals(number).name,
            )


@contextmanager
def interrupt_request() -> Iterator[InterruptRequest]:
    """Within the block, ``stop_signals()`` are remembered instead of ending the process."""
    request = InterruptRequest()
    # Python delivers signals to the main thread only, and only it may set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    with handled(dict.fromkeys(stop_signals(), request.receive)):
        yield request


@contextmanager
def ending_at_once(request: InterruptRequest, message: str) -> Iterator[None]:
    """For long work between two iterations: within the block a signal ends it at once.

    Several processes would lose each other, so there the signal waits for the next iteration.

    Raises:
        Interrupted: with ``message``, after a signal before or within the block.
    """
    if distributed.world_size() > 1:
        yield
        return
    try:
        if request:
            raise KeyboardInterrupt
        request.immediate = True
        yield
    except KeyboardInterrupt:
        raise Interrupted(message) from None
    finally:
        request.immediate = False

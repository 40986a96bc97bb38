"""Ctrl-C, a terminal that is gone, and what clusters send before they take a machine away."""

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
    """Whether someone asked to stop; true from the first signal on.

    Attributes:
        immediate: whether the next signal is to end what runs at once, by a KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self._received: set[int] = set()
        self.immediate = False

    def __bool__(self) -> bool:
        return bool(self._received)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: it is remembered, and a second Ctrl-C ends everything at once.

        Other signals may come several times for one and the same wish, to the group of processes
        and from the parent: however often, they never mean haste.

        Raises:
            KeyboardInterrupt: it is the second Ctrl-C, or ``immediate`` is set.
        """
        if number == signal.SIGHUP:
            let_go_of_lost_terminal()
        first, again = not self._received, number in self._received
        self._received.add(number)
        if self.immediate or (again and number == signal.SIGINT):
            # Once: what is ended saves before it goes.
            self.immediate = False
            raise KeyboardInterrupt
        if first:
            logger.warning(
                "%s: stopping after this iteration, with a checkpoint (a second Ctrl-C: at once)",
                signal.Signals(number).name,
            )


@contextmanager
def interrupt_request() -> Iterator[InterruptRequest]:
    """Within the block, what ``stop_signals`` has is remembered instead of ending the process."""
    request = InterruptRequest()
    # Python hands signals to the main thread alone, and lets no other one ask for them.
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    with handled(dict.fromkeys(stop_signals(), request.receive)):
        yield request


@contextmanager
def ending_at_once(request: InterruptRequest, message: str) -> Iterator[None]:
    """For what takes long between two iterations: within the block a signal ends it at once.

    Several processes would lose each other, so there the signal waits for the next iteration.

    Raises:
        Interrupted: a signal came, before the block or within; ``message`` says where.
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

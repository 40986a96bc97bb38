"""How a run that saves its results ends by a signal."""

from __future__ import annotations

import signal
from types import FrameType

from cascade_det.parallel.signals import let_go_of_lost_terminal


class Ending:
    """Handles stop signals; a second Ctrl-C raises KeyboardInterrupt anywhere.

    Attributes:
        status: the exit status after the first signal; ``None`` before.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        self._at_once = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        """A handler of signals."""
        if number == signal.SIGHUP:
            let_go_of_lost_terminal()
        first, self.status = self.status is None, self.status or 128 + number
        # Cluster managers may send other signals several times for one stop.
        if (first and self._at_once) or (number == signal.SIGINT and not first):
            raise KeyboardInterrupt

    def at_once(self) -> None:
        """From now on the first signal raises KeyboardInterrupt, as does one already received."""
        self._at_once = True
        if self.status is not None:
            raise KeyboardInterrupt

    def later(self) -> None:
        """From now on the first signal is only remembered, since results are being saved."""
        self._at_once = False

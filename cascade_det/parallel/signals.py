"""Signals that ask for an end, and what is left of a terminal after one of them."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from cascade_det.parallel.worker_signals import PARTING_SIGNALS

Handler = Callable[[int, FrameType | None], None] | signal.Handlers
# The exit status after Ctrl-C, as shells have it.
INTERRUPTED = 128 + signal.SIGINT


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that mean the wish to stop: SIGINT, SIGTERM, and others that would kill.

    SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU are left alone where they are ignored, as by ``nohup``, or
    where the program around this one handles them.
    """
    fatal = (n for n in PARTING_SIGNALS if signal.getsignal(n) is signal.SIG_DFL)
    return (signal.SIGINT, signal.SIGTERM, *fatal)


@contextmanager
def handled(handlers: Mapping[signal.Signals, Handler]) -> Iterator[None]:
    """Within the block these signals have these handlers; to be called from the main thread."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def let_go_of_lost_terminal() -> None:
    """After a SIGHUP: let output go nowhere, where each write to the terminal would fail."""
    for descriptor in (1, 2):
        try:
            is_lost = stat.S_ISCHR(os.fstat(descriptor).st_mode) and _fails(descriptor)
        except OSError:
            continue
        if is_lost:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def _fails(descriptor: int) -> bool:
    try:
        os.write(descriptor, b"")
    except OSError:
        return True
    return False

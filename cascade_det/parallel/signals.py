"""Signals that ask a process to stop, and output after its terminal is lost."""

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
    """The signals that ask to stop: SIGINT, SIGTERM, and others that would kill.

    SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU are left out if they are ignored, as under ``nohup``, or
    handled by the surrounding program.
    """
    fatal = (n for n in PARTING_SIGNALS if signal.getsignal(n) is signal.SIG_DFL)
    return (signal.SIGINT, signal.SIGTERM, *fatal)


@contextmanager
def handled(handlers: Mapping[signal.Signals, Handler]) -> Iterator[None]:
    """Set signal handlers within the block; call it from the main thread."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def let_go_of_lost_terminal() -> None:
    """After a SIGHUP, discard output to a terminal that is gone: each write would fail."""
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

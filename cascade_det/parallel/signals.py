"""Signals that ask a process or the workers of a loader to stop, and a lost terminal."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

_LOOK = 5.0  # seconds between two looks of a worker for its parent

Handler = Callable[[int, FrameType | None], None] | signal.Handlers
# The exit status after Ctrl-C, as shells have it.
INTERRUPTED = 128 + signal.SIGINT

# A lost terminal, and the warnings of schedulers before they take a machine away.
_PARTING_SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)

_IGNORED = {signal.SIGINT, *_PARTING_SIGNALS}
# A worker recognises its parent's SIGTERM by sigwaitinfo, which macOS does not have.
_NOT_FOR_WORKERS = _IGNORED | ({signal.SIGTERM} if hasattr(signal, "sigwaitinfo") else set())


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask to stop: SIGINT, SIGTERM, and others that would kill.

    SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU are left out if they are ignored, as under ``nohup``, or
    handled by the surrounding program.
    """
    fatal = (n for n in _PARTING_SIGNALS if signal.getsignal(n) is signal.SIG_DFL)
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
            if not stat.S_ISCHR(os.fstat(descriptor).st_mode):
                continue
        except OSError:  # closed
            continue
        try:
            os.write(descriptor, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


@contextmanager
def signals_held() -> Iterator[None]:
    """Start workers within the block: they inherit blocked signals, which cannot end them.

    Signals that arrive within the block are handled after it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_WORKERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_main_process() -> None:
    """Make a worker end only with its main process, whatever signals it gets; call it once.

    Ctrl-C, SIGTERM and the signals of a hangup or a scheduler may reach all processes of a group.
    The main one ends its workers itself after the last batch that it needs: by a message, and at
    its own exit by a SIGTERM. If it is gone, the worker ends now or soon: PyTorch only looks for
    changes of the parent from some later point on.
    """
    parent = multiprocessing.parent_process()
    pid = os.getppid() if parent is None else parent.pid
    if os.getppid() != pid:
        os._exit(0)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    if signal.SIGTERM in _NOT_FOR_WORKERS:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(pid,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End when the parent is gone, or sends a SIGTERM."""
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, _LOOK)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)

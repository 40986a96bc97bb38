"""Signals and the workers of a loader: what to do about them is the main process's business."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# A terminal that is gone, and what schedulers send before they take a machine away.
PARTING_SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)

_IGNORED = {signal.SIGINT, *PARTING_SIGNALS}
# A worker tells the SIGTERM of its parent from another's by sigwaitinfo, which macOS does not have.
_NOT_FOR_WORKERS = _IGNORED | ({signal.SIGTERM} if hasattr(signal, "sigwaitinfo") else set())


@contextmanager
def signals_held() -> Iterator[None]:
    """For starting workers: they are born with the signals blocked that could end them.

    Signals that come within the block are handled when it is over.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_WORKERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_main_process() -> None:
    """Called in a worker, once: only the main process may end it from there on.

    Ctrl-C, SIGTERM and the signals of a hangup or a scheduler may reach all processes of a group.
    The main one ends its workers itself when it is done with the batches that it still wants: by a
    message, and at its own exit by a SIGTERM. If it is gone already, the worker ends now: PyTorch
    looks for a change of the parent from here on, and would never see one.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(0)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    if signal.SIGTERM in _NOT_FOR_WORKERS:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_parent_says_so, daemon=True).start()


def _end_when_the_parent_says_so() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)

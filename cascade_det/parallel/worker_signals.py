"""Workers of a loader leave signals to the main process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# A lost terminal, and the warnings of schedulers before they take a machine away.
PARTING_SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)

_IGNORED = {signal.SIGINT, *PARTING_SIGNALS}
# A worker recognises its parent's SIGTERM by sigwaitinfo, which macOS does not have.
_NOT_FOR_WORKERS = _IGNORED | ({signal.SIGTERM} if hasattr(signal, "sigwaitinfo") else set())


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
    """Called in a worker, once: from now on only the main process may end it.

    Ctrl-C, SIGTERM and the signals of a hangup or a scheduler may reach all processes of a group.
    The main one ends its workers itself after the last batch that it needs: by a message, and at
    its own exit by a SIGTERM. If it is gone already, the worker ends now: PyTorch only looks for
    changes of the parent from here on.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(0)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    if signal.SIGTERM in _NOT_FOR_WORKERS:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_at_parents_sigterm, daemon=True).start()


def _end_at_parents_sigterm() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)

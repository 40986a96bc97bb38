"""Child processes that start and end together."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from cascade_det.errors import CascadeDetError
from cascade_det.files import atomic_path
from cascade_det.parallel.signals import INTERRUPTED, handled, signals_held, stop_signals

logger = logging.getLogger(__name__)

# Errors that the user can fix: raised unchanged, reported without a traceback.
USER_ERRORS = (CascadeDetError, FloatingPointError)

# Seconds for processes to end by themselves once one has failed, and then to obey SIGTERM, which
# one that hangs in a collective does not, before they are killed.
_GRACE = 15.0
_TERMINATION = 10.0
# The grace after a single Ctrl-C: time for the main process to save.
_INTERRUPTION = 600.0
# Seconds between two checks for signals, which do not end a wait.
_POLL = 0.5


class Interrupted(Exception):
    """A signal ended the training, after a checkpoint."""


class PeerError(RuntimeError):
    """Another process failed, so this one cannot continue; the other one reports the cause."""


@dataclass(frozen=True)
class _Failure:
    """How a process failed: seconds since the epoch, the error, and its traceback as text."""

    time: float
    error: Exception
    trace: str


def run_processes(
    function: Callable[..., int], args: tuple[Any, ...], count: int, *, first_rank: int = 0
) -> int:
    """Call ``function(index, *args)`` in ``count`` new processes and wait for all of them.

    If one fails, the others get a few seconds and are then stopped. The processes handle signals
    themselves: for each of ``stop_signals()`` that arrives here they get a SIGTERM, besides the
    signal that may reach them from the terminal, and also if this process dies. Call it from the
    main thread.

    Args:
        function: at the top level of a module; returns an exit status.
        args: picklable.
        count: 1 or more.
        first_rank: the rank of process 0, for messages.

    Returns:
        The common exit status; 130 after Ctrl-C, 143 after SIGTERM and the like; 1 if a process
        died or returned another status than the others, after an error in the log that names rank
        and cause.

    Raises:
        CascadeDetError, FloatingPointError: what the first failed process raised.
    """
    caught = _Caught()
    handlers = dict.fromkeys(stop_signals(), caught.terminate) | {signal.SIGINT: caught.interrupt}
    with tempfile.TemporaryDirectory(prefix="cascade-det-") as folder, handled(handlers):
        start = multiprocessing.get_context("spawn").Process
        with signals_held():  # started later, Python's helper would die of a SIGHUP
            resource_tracker.ensure_running()
        processes = caught.processes
        try:
            for index in range(count):
                process = start(target=_call, args=(index, function, args, Path(folder)))
                process.start()
                processes.append(process)
            if caught.terminated or caught.interruptions:
                caught.forward()
            _wait_for(processes, caught)
        finally:
            stopped = _stop(processes)
        # Written by our own children, into a folder that only this user can read.
        files = Path(folder).glob("[0-9]*")
        failures = {int(file.name): pickle.loads(file.read_bytes()) for file in files}
    statuses = [process.exitcode or 0 for process in processes]
    ended = _end_by_signals(statuses, failures, stopped, caught)
    if ended is not None:
        return ended
    if len(set(statuses)) == 1 and statuses[0] >= 0 and not failures:
        return statuses[0]
    cause = _first_cause(statuses, failures, stopped)
    failure = failures.get(cause)
    if failure is not None and isinstance(failure.error, USER_ERRORS):
        raise failure.error
    logger.error("%s", _describe(first_rank + cause, processes[cause], failure))
    return 1


@dataclass
class _Caught:
    """The signals that arrived while waiting, which are passed on to the processes."""

    interruptions: int = 0
    terminated: bool = False
    processes: list[BaseProcess] = field(default_factory=list)

    def interrupt(self, *_: Any) -> None:
        self.interruptions += 1
        self.forward()

    def terminate(self, *_: Any) -> None:
        self.terminated = True
        self.forward()

    def forward(self) -> None:
        # A signal from a terminal has reached the others already, one from elsewhere has not. An
        # extra SIGTERM does no harm, while a second SIGINT means haste.
        for process in self.processes:
            process.terminate()


def _wait_for(processes: Sequence[BaseProcess], caught: _Caught) -> None:
    """Return when all have ended, or some time after a failure or a second Ctrl-C."""
    failed_at = math.inf
    alive = list(processes)
    while alive:
        connection.wait([process.sentinel for process in alive], timeout=_POLL)
        alive = [process for process in alive if process.is_alive()]
        codes = {process.exitcode for process in processes} - {None, 0}
        if codes or caught.interruptions > 1:
            failed_at = min(failed_at, time.monotonic())
        in_order = codes == {INTERRUPTED} or caught.interruptions == 1 or caught.terminated
        patience = _INTERRUPTION if in_order and caught.interruptions < 2 else _GRACE
        if time.monotonic() > failed_at + patience:
            return


def _stop(processes: Sequence[BaseProcess]) -> set[int]:
    """End the processes that still run; returns their indices."""
    stopped = {index for index, process in enumerate(processes) if process.is_alive()}
    for index in stopped:
        processes[index].terminate()
    deadline = time.monotonic() + _TERMINATION
    for index in stopped:
        processes[index].join(max(deadline - time.monotonic(), 0.0))
        if processes[index].is_alive():
            processes[index].kill()
    for process in processes:
        process.join()
    return stopped


def _end_by_signals(
    statuses: Sequence[int],
    failures: dict[int, _Failure],
    stopped: set[int],
    caught: _Caught,
) -> int | None:
    """The exit status after signals; ``None`` if no signal is the cause.

    Raises:
        CascadeDetError, FloatingPointError: raised on the way out, as by a save to a full disk.
    """
    if caught.interruptions > 1:
        return INTERRUPTED
    by_themselves = {s for index, s in enumerate(statuses) if index not in stopped}
    # Processes that had no handlers yet, or no longer.
    killed = caught.interruptions > 0 and bool(by_themselves & {-signal.SIGINT, -signal.SIGTERM})
    if not (caught.terminated or killed or INTERRUPTED in statuses):
        return None
    # Other failures come from losing the processes that ended first.
    users = [f for f in failures.values() if isinstance(f.error, USER_ERRORS)]
    if users:
        raise min(users, key=lambda failure: failure.time).error
    return 128 + signal.SIGTERM if caught.terminated else INTERRUPTED


def _first_cause(statuses: Sequence[int], failures: dict[int, _Failure], stopped: set[int]) -> int:
    """Index of the process that failed by itself, not because another one had."""

    def order(index: int) -> tuple[int, float]:
        if failure := failures.get(index):
            return (2 if isinstance(failure.error, PeerError) else 1), failure.time
        # NCCL aborts a process whose peers are gone; any other signal comes from outside.
        killed = statuses[index] < 0 and statuses[index] != -signal.SIGABRT
        return (0 if killed else 3), 0.0

    died = [index for index, status in enumerate(statuses) if status and index not in stopped]
    return min(died, key=order)


def _describe(rank: int, process: BaseProcess, failure: _Failure | None) -> str:
    subject = f"The process of rank {rank} (pid {process.pid})"
    rest = "The other processes were stopped. --resume continues from the last checkpoint."
    if failure is not None:
        return f"{subject} failed: {failure.trace.rstrip()}\n{rest}"
    status = process.exitcode or 0
    if status >= 0:
        return f"{subject} ended with status {status}. {rest}"
    name = signal.Signals(-status).name
    hint = ""
    if -status == signal.SIGKILL:
        hint = (
            " Perhaps the system ran out of memory: if the kernel's log (dmesg) says so, lower "
            "SOLVER.IMS_PER_BATCH or DATALOADER.NUM_WORKERS."
        )
    return f"{subject} was killed by the signal {name}.{hint} {rest}"


def _call(index: int, function: Callable[..., int], args: tuple[Any, ...], folder: Path) -> None:
    """Call the function in the new process, and save its failure for the parent."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        status = function(index, *args)
    except (KeyboardInterrupt, Interrupted):
        status = INTERRUPTED
    except Exception as error:
        status = 1
        failure = _Failure(time.time(), portable(error), traceback.format_exc())
        with atomic_path(folder / str(index)) as temporary:
            temporary.write_bytes(pickle.dumps(failure))
    sys.exit(status)


def _end_with_parent() -> None:
    # Linux alone could do this in the kernel, but by the parent's thread instead of its process.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_INTERRUPTION)
        os.kill(os.getpid(), signal.SIGKILL)


def portable(error: Exception) -> Exception:
    """An error that can be pickled: a user's or peer's error itself if possible, else its text."""
    if isinstance(error, (*USER_ERRORS, PeerError)):
        try:
            return pickle.loads(pickle.dumps(error))
        except Exception:
            kind = next(kind for kind in (*USER_ERRORS, PeerError) if isinstance(error, kind))
            return kind(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")

"""Child processes that start and end together."""

from __future__ import annotations

import logging
import math
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import resource_tracker, spawn
from pathlib import Path
from typing import Any

from cascade_det.errors import CascadeDetError, ConfigError
from cascade_det.files import atomic_path
from cascade_det.parallel.signals import INTERRUPTED, handled, signals_held, stop_signals

logger = logging.getLogger(__name__)

# Errors that the user can fix: raised unchanged, reported without a traceback.
USER_ERRORS = (CascadeDetError, FloatingPointError)

# How long the machines wait for each other.
_MEETING = timedelta(minutes=10)
# Seconds for processes to end after a second Ctrl-C, and after any other signal: time to save.
_GRACE = 25.0
_INTERRUPTION = 600.0
# Seconds between two looks for signals, and at the parent.
_POLL = 0.2
# Seconds between a failure and the end of its process, many times the launcher's interval.
_DELAY = 1.0


class Interrupted(Exception):
    """A signal ended the training, after a checkpoint."""


class PeerError(RuntimeError):
    """Another process failed, so this one cannot continue; the other one reports the cause."""


@dataclass(frozen=True)
class _End:
    """How a process ended: its status; after a failure, the error and its traceback as text."""

    pid: int
    status: int
    time: float = 0.0  # seconds since the epoch
    error: Exception | None = None
    trace: str = ""


def run_processes(
    function: Callable[..., int],
    args: tuple[Any, ...],
    count: int,
    *,
    num_machines: int = 1,
    machine_rank: int = 0,
    host: str = "127.0.0.1",
    port: int = 0,
) -> int:
    """Call ``function(index, *args)`` in ``count`` new processes and wait for all of them.

    torch's elastic launcher starts and watches them, without restarts, and tells them their place
    by its variables. If one fails, it stops the others. The processes handle signals themselves:
    each of ``stop_signals()`` that arrives here is passed on, and a SIGTERM if this process dies.
    Call it from the main thread.

    Args:
        function: at the top level of a module; returns an exit status.
        args: picklable.
        count: 1 or more.
        num_machines: all call this; processes are started once the machines have met.
        machine_rank: from 0.
        host: of machine 0, where the machines meet.
        port: there; 0 is any free one, for a single machine.

    Returns:
        The common exit status; 130 after Ctrl-C, 143 after SIGTERM and the like; 1 if a process
        died or returned another status than the others, after an error in the log that names rank
        and cause.

    Raises:
        ConfigError: the machines do not meet there.
        CascadeDetError, FloatingPointError: what the first failed process raised.
    """
    with handled({signal.SIGINT: signal.SIG_DFL}):  # a wait for other machines stays in C++
        store = _meet(num_machines, machine_rank, host, port)
    received: list[int] = []
    handlers = dict.fromkeys(stop_signals(), lambda number, _: received.append(number))
    with tempfile.TemporaryDirectory(prefix="cascade-det-") as name, handled(handlers):
        folder = Path(name)
        place = spawn.get_preparation_data("MainProcess")
        del place["authkey"]  # of multiprocessing's own children only
        (folder / "work").write_bytes(pickle.dumps(place) + pickle.dumps((function, args)))
        # In the main thread the agent would replace our handlers.
        with ThreadPoolExecutor(1) as threads:
            machines = num_machines, machine_rank, f"[{host}]:{store.port}"
            agent = threads.submit(_run_agent, folder, count, *machines)
            _pass_signals_on(received, agent, folder)
        # Written by our own children, into a folder that only this user can read.
        files = folder.glob("*.end")
        ends = {int(file.stem): pickle.loads(file.read_bytes()) for file in files}
    failed = {i: end for i, end in agent.result().items() if i not in ends or ends[i].error}
    ends = failed | ends
    if (ended := _end_by_signals(list(ends.values()), received)) is not None:
        return ended
    statuses = {end.status for end in ends.values()}
    if not failed and len(statuses) == 1:
        return statuses.pop()
    cause = _first_cause(ends, failed)
    if isinstance(ends[cause].error, USER_ERRORS):
        raise ends[cause].error
    logger.error("%s", _describe(machine_rank * count + cause, ends[cause]))
    return 1


def _meet(num_machines: int, machine_rank: int, host: str, port: int) -> Any:
    """Wait for all machines; returns their ``TCPStore``, which the agent takes, too."""
    from torch.distributed import TCPStore  # here, since the processes do without

    try:
        return TCPStore(
            host, port, num_machines, machine_rank == 0, timeout=_MEETING, multi_tenant=True
        )
    except RuntimeError as error:
        raise ConfigError(
            f"--dist-url tcp://{host}:{port}: the machines cannot meet there ({error}). Give the "
            "address of machine 0 and a port of it that is free and open to the others, and start "
            "all machines within ten minutes."
        ) from error


def _run_agent(
    folder: Path, count: int, num_machines: int, machine_rank: int, endpoint: str
) -> dict[int, _End]:
    """Start processes and wait for them; those that failed, in the order in which they did."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        num_machines,
        num_machines,
        count,
        run_id="cascade-det",
        rdzv_backend="static",
        rdzv_endpoint=endpoint,
        rdzv_configs={"rank": machine_rank},
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
    )
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import run_child; "
        f"run_child({str(folder)!r}, {os.getpid()})"
    )
    logging.disable()  # it tells every failure at length, and we tell the cause afterwards
    try:
        elastic_launch(config, sys.executable)("-c", code)
    except ChildFailedError as error:
        return {f.local_rank: _End(f.pid, f.exitcode) for f in error.failures.values()}
    finally:
        logging.disable(logging.NOTSET)
    return {}


def _pass_signals_on(received: list[int], agent: Future[Any], folder: Path) -> None:
    """Wait for the agent; after a second Ctrl-C, or too long after a signal, kill the processes."""
    sent: dict[int, int] = {}
    deadline = math.inf
    while wait([agent], timeout=_POLL).not_done:
        orders: list[int] = list(received)
        if orders:
            patience = _GRACE if orders.count(signal.SIGINT) > 1 else _INTERRUPTION
            deadline = min(deadline, time.monotonic() + patience)
        if time.monotonic() > deadline:
            orders.append(signal.SIGKILL)
        for pid in (int(file.stem) for file in folder.glob("*.pid")):
            for number in orders[sent.get(pid, 0) :]:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            sent[pid] = len(orders)


def _end_by_signals(ends: Sequence[_End], received: Sequence[int]) -> int | None:
    """The exit status after signals; ``None`` if no signal is the cause.

    Raises:
        CascadeDetError, FloatingPointError: raised on the way out, as by a save to a full disk.
    """
    if received.count(signal.SIGINT) > 1:
        return INTERRUPTED
    terminated = any(number != signal.SIGINT for number in received)
    # Processes without handlers, not yet or no longer, may die of a Ctrl-C.
    if not (terminated or {INTERRUPTED, -signal.SIGINT} & {end.status for end in ends}):
        return None
    # Other failures come from losing the processes that ended first.
    users = [end for end in ends if isinstance(end.error, USER_ERRORS)]
    if error := min(users, key=lambda end: end.time).error if users else None:
        raise error
    return 128 + signal.SIGTERM if terminated else INTERRUPTED


def _first_cause(ends: dict[int, _End], failed: Iterable[int]) -> int:
    """Index of the process that failed by itself, not because another one had."""
    first = next(iter(failed), None)

    def order(index: int) -> tuple[bool, bool, bool, float]:
        end = ends[index]
        killed = end.error is None  # which the launcher does to all but the first
        return not killed or index != first, killed, isinstance(end.error, PeerError), end.time

    return min((index for index, end in ends.items() if end.status), key=order)


def _describe(rank: int, end: _End) -> str:
    subject = f"The process of rank {rank} (pid {end.pid})"
    rest = "The other processes were stopped. --resume continues from the last checkpoint."
    if end.error is not None:
        return f"{subject} failed: {end.trace.rstrip()}\n{rest}"
    if end.status >= 0:
        return f"{subject} ended with status {end.status}. {rest}"
    name = signal.Signals(-end.status).name
    hint = ""
    if -end.status == signal.SIGKILL:
        hint = (
            " Perhaps the system ran out of memory: if the kernel's log (dmesg) says so, lower "
            "SOLVER.IMS_PER_BATCH or DATALOADER.NUM_WORKERS."
        )
    return f"{subject} was killed by the signal {name}.{hint} {rest}"


def run_child(folder_name: str, parent: int) -> None:
    """What a started process runs: the function, whose end is saved for the parent.

    Args:
        folder_name: where the parent has put the function and its arguments.
        parent: its id.
    """
    folder, index, pid = Path(folder_name), int(os.environ["LOCAL_RANK"]), os.getpid()
    threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()
    try:
        with signals_held():  # started later, Python's helper would die of a SIGHUP
            resource_tracker.ensure_running()
        (folder / f"{pid}.pid").touch()
        with (folder / "work").open("rb") as file:
            spawn.prepare(pickle.load(file))
            function, args = pickle.load(file)
        end = _End(pid, function(index, *args))
    except (KeyboardInterrupt, Interrupted):
        end = _End(pid, INTERRUPTED)
    except Exception as error:
        end = _End(pid, 1, time.time(), portable(error), traceback.format_exc())
    with atomic_path(folder / f"{index}.end", durable=False) as temporary:
        temporary.write_bytes(pickle.dumps(end))
    if end.error is not None:
        # A process that lost another one lets the launcher find that one first.
        time.sleep(0.0 if isinstance(end.error, USER_ERRORS) else _DELAY)
        sys.exit(1)  # any other status would be a failure to the launcher, which ends the others


def end_with_parent(parent: int) -> None:
    """End this process when its parent, of this id, does: a target for a thread."""
    while os.getppid() == parent:
        time.sleep(_POLL)
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

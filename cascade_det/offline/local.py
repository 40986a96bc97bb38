"""Parts in several processes of this machine."""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from cascade_det.errors import CascadeDetError
from cascade_det.offline.plan import Part
from cascade_det.offline.worker import MOST_TRIES, Counts, Job, PartWorker
from cascade_det.parallel.processes import end_with_parent, portable

logger = logging.getLogger(__name__)

_PATIENCE = 10.0  # seconds to end before SIGKILL


@dataclass
class _Worker:
    number: int
    process: BaseProcess
    pipe: Connection
    part: Part | None = None  # that it detects in


def run_local(job: Job, parts: Sequence[Part], processes: int) -> Generator[Counts, None, None]:
    """Make the files of parts; yields the counts of each when it is done.

    The processes end with this one, however it ends. If one dies, its part is tried again in a
    new one. On a machine with several GPUs they take turns at them.

    Args:
        job: see there.
        parts: to be done.
        processes: 1 or more.

    Raises:
        CascadeDetError: a process raised it, or processes died with the same part again and again.
        RuntimeError: a process raised another error.
    """
    waiting = deque(parts)
    deaths: Counter[str] = Counter()
    workers: list[_Worker] = []
    processes = min(processes, len(parts))
    try:
        workers += [_start(job, number, processes) for number in range(processes)]
        while waiting or any(worker.part for worker in workers):
            for worker in _ready(workers):
                alive, counts = _receive(worker)
                if counts is not None:
                    yield counts
                if alive:
                    worker.part = waiting.popleft() if waiting else None
                    if worker.part is not None:
                        _send(worker, worker.part)
                    continue
                _count_death(worker, deaths)
                if worker.part is not None:
                    waiting.appendleft(worker.part)
                workers.remove(worker)
                workers.append(_start(job, worker.number, processes))
    finally:
        _stop(workers)


def _ready(workers: Sequence[_Worker]) -> list[_Worker]:
    """Those that have sent something, or ended."""
    # A pipe whose other end is closed, as by a death, is ready too.
    pipes = {worker.pipe: worker for worker in workers}
    return [pipes[pipe] for pipe in connection.wait(list(pipes)) if isinstance(pipe, Connection)]


def _receive(worker: _Worker) -> tuple[bool, Counts | None]:
    """Whether the process lives, and what it has done."""
    try:
        message = worker.pipe.recv()
    except (EOFError, OSError):
        return False, None
    if not isinstance(message, Exception):
        return True, message
    raise message


def _send(worker: _Worker, part: Part) -> None:
    try:
        worker.pipe.send(part)
    except OSError:
        logger.debug("process %d ended before it got a part", worker.number)  # noticed by its pipe


def _count_death(worker: _Worker, deaths: Counter[str]) -> None:
    worker.process.join()
    code = worker.process.exitcode or 0
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    what = "its start" if worker.part is None else worker.part.name
    deaths[what] += 1
    memory = " Perhaps the memory was full: see dmesg." if code == -signal.SIGKILL else ""
    if deaths[what] == MOST_TRIES:
        images = "" if worker.part is None else f", with {len(worker.part.entries)} images"
        raise CascadeDetError(
            f"{what}{images}: {MOST_TRIES} processes ended in it, the last one by {how}.{memory} "
            "The other parts that are done are kept: the same command continues."
        )
    logger.warning("A process ended by %s in %s, which is tried again.%s", how, what, memory)


def _start(job: Job, number: int, processes: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # Not a daemon: loaders and compilers of the model may have children.
    process = context.Process(target=_work, args=(theirs, job, number, processes, os.getpid()))
    process.start()
    theirs.close()  # so that our end notices when the process does
    return _Worker(number, process, ours)


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.pipe.close()  # an idle process ends by it
        if worker.part is not None:
            worker.process.terminate()
    for worker in workers:
        worker.process.join(_PATIENCE)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _work(pipe: Connection, job: Job, number: int, processes: int, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()
    from cascade_det.engine.log import setup_logging

    try:
        if number == 0:  # the others would say the same
            setup_logging()
        worker = PartWorker(_on_its_device(job, number, processes))
        pipe.send(None)
        while True:
            part = pipe.recv()
            pipe.send(worker.run(part))
    except EOFError:
        return
    except Exception as error:
        failure = portable(error)
        if not isinstance(failure, CascadeDetError):
            failure = RuntimeError(f"in process {number}:\n{traceback.format_exc()}")
        pipe.send(failure)


def _on_its_device(job: Job, number: int, processes: int) -> Job:
    """The job with a GPU of several, or with a share of the cores."""
    cfg = job.cfg
    if cfg.MODEL.DEVICE == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # PyTorch's own default is all cores, which so many processes would fight for.
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    if cfg.MODEL.DEVICE == "cuda" and torch.cuda.device_count() > 1:
        cfg = copy.deepcopy(cfg)
        cfg.defrost()
        cfg.MODEL.DEVICE = f"cuda:{number % torch.cuda.device_count()}"
    return Job(cfg, job.model, job.output, job.readers)

"""Processes that live and die together; what they run here is light, so that they start fast."""

import inspect
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import PContext

from cascade_det.errors import CascadeDetError, CheckpointError, ConfigError, DatasetError
from cascade_det.parallel import processes
from cascade_det.parallel.interrupts import Interrupted, interrupt_request
from cascade_det.parallel.processes import PeerError, run_processes

ROOT = Path(__file__).parents[2]


def give(index, statuses):
    return statuses[index]


def raise_errors(index, errors):
    """Process 1 fails first; the other one only because of that."""
    time.sleep(0.0 if index == 1 else 1.5)
    if errors[index] is not None:
        raise errors[index]
    return 0


def die(index, folder):
    """Process 1 kills itself when process 0 is there; that one would go on for ever."""
    (folder / f"{index}.pid").write_text(str(os.getpid()))
    while not (folder / "0.pid").exists():
        time.sleep(0.01)
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    # As in a collective that never comes back to Python.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def work_until_a_signal(index, folder):
    """As training does: go on until a signal asks for an end, and save, which takes a while."""
    lock = multiprocessing.get_context("spawn").Lock()  # as of loaders: its name is looked after
    with interrupt_request() as request:
        (folder / f"{index}.pid").write_text(str(os.getpid()))
        while not request:
            time.sleep(0.01)
        time.sleep(0.5)
        (folder / f"{index}.saved").touch()
    del lock
    raise Interrupted("after a checkpoint")


def wait(index, folder):
    """As what comes before training: no signal has a handler."""
    (folder / f"{index}.pid").write_text(str(os.getpid()))
    time.sleep(600)


def hang(index, folder):
    """As in a collective that never comes back to Python."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    wait(index, folder)


class NotUnpicklable(DatasetError):
    def __init__(self, file, line):
        super().__init__(f"{file}, line {line}")


def is_alive(pid_file):
    try:
        os.kill(int(pid_file.read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def test_the_status_that_all_give():
    assert run_processes(give, ([3, 3],), 2) == 3


def test_a_process_that_gives_another_status_is_named(caplog):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"num_machines": 2, "port": probe.getsockname()[1]}
    first = multiprocessing.get_context("spawn").Process(
        target=run_processes, args=(give, ([0, 0],), 2), kwargs=place
    )
    first.start()
    assert run_processes(give, ([0, 7],), 2, **place, machine_rank=1) == 1
    first.join()
    assert first.exitcode == 0
    assert "rank 3" in caplog.text
    assert "status 7" in caplog.text


def test_errors_of_the_user_come_out_as_they_are():
    errors = [RuntimeError("connection closed"), FloatingPointError("training diverged")]
    with pytest.raises(FloatingPointError, match=r"^training diverged$"):
        run_processes(raise_errors, (errors,), 2)


@pytest.mark.parametrize("error", [ConfigError("KEY is 3"), NotUnpicklable("a.json", 3)])
def test_an_error_that_travels_says_the_same(error):
    there = pickle.loads(pickle.dumps(processes.portable(error)))
    assert isinstance(there, CascadeDetError)
    assert str(there) == str(error)


def test_a_bug_is_told_with_its_traceback_and_rank(caplog):
    errors = [PeerError("the main process failed"), KeyError("a bug")]
    assert run_processes(raise_errors, (errors,), 2) == 1
    assert "rank 1" in caplog.text
    assert "in raise_errors" in caplog.text
    assert "a bug" in caplog.text
    assert "main process failed" not in caplog.text


def test_interrupted_processes_are_no_failure(caplog):
    errors = [RuntimeError("connection closed"), Interrupted("after a checkpoint")]
    assert run_processes(raise_errors, (errors,), 2) == 130
    assert not caplog.records


def test_a_save_that_fails_after_a_signal_is_told():
    errors = [CheckpointError("the disk is full"), Interrupted("after a checkpoint")]
    with pytest.raises(CheckpointError, match=r"^the disk is full$"):
        run_processes(raise_errors, (errors,), 2)


@pytest.mark.parametrize(("function", "times"), [(wait, 1), (hang, 2)])
def test_ctrl_c_ends_processes_without_a_handler(tmp_path, caplog, monkeypatch, function, times):
    monkeypatch.setattr(processes, "_GRACE", 0.3)

    def press():
        wait_until(lambda: all((tmp_path / f"{i}.pid").exists() for i in (0, 1)))
        for _ in range(times):
            time.sleep(0.2)  # else two signals may be one
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    assert run_processes(function, (tmp_path,), 2) == 130
    thread.join()
    assert not caplog.records
    assert not any(is_alive(tmp_path / f"{i}.pid") for i in (0, 1))


def test_a_killed_process_takes_the_others_down(tmp_path, caplog, monkeypatch):
    assert inspect.signature(PContext.close).parameters["timeout"].default < 45
    monkeypatch.setattr(PContext.close, "__defaults__", (None, 0.3))  # it would be 30 seconds
    with caplog.at_level(logging.ERROR):
        assert run_processes(die, (tmp_path,), 2) == 1
    assert "rank 1" in caplog.text
    assert "SIGKILL" in caplog.text
    assert not is_alive(tmp_path / "0.pid")


def test_patience_is_less_than_a_minute():
    assert processes._GRACE < 45


@pytest.mark.parametrize(
    ("number", "to_group", "status"),
    [
        (signal.SIGINT, True, 130),  # a terminal tells all of them
        (signal.SIGINT, False, 130),
        (signal.SIGTERM, True, 143),  # and so do clusters
        (signal.SIGTERM, False, 143),
        (signal.SIGHUP, True, 143),  # a terminal that is gone tells all of them
        (signal.SIGUSR1, False, 143),
        (signal.SIGKILL, False, -9),
    ],
)
def test_after_a_signal_all_save(tmp_path, number, to_group, status):
    program = (
        "from pathlib import Path\n"
        "from cascade_det.parallel.processes import run_processes\n"
        "from tests.parallel.test_processes import work_until_a_signal\n"
        "if __name__ == '__main__':\n"
        f"    raise SystemExit(run_processes(work_until_a_signal, (Path({str(tmp_path)!r}),), 2))\n"
    )
    (tmp_path / "program.py").write_text(program)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "program.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=(tmp_path / "errors").open("w"),
        start_new_session=True,
    )
    wait_until(lambda: all((tmp_path / f"{i}.pid").exists() for i in (0, 1)))
    time.sleep(0.1)
    (os.killpg if to_group else os.kill)(parent.pid, number)
    assert parent.wait(timeout=60) == status
    wait_until(lambda: not any(is_alive(tmp_path / f"{i}.pid") for i in (0, 1)))
    assert all((tmp_path / f"{i}.saved").exists() for i in (0, 1))
    # The process that looks after names is in the group too, and must not be lost before them.
    assert "resource_tracker" not in (tmp_path / "errors").read_text()


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)

"""Processes that live and die together; what they run here is light, so that they start fast."""

import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cascade_det.engine import processes
from cascade_det.engine.interrupts import Interrupted
from cascade_det.engine.processes import PeerError, run_processes
from cascade_det.errors import CascadeDetError, ConfigError, DatasetError

ROOT = Path(__file__).parents[2]


def give(index, statuses):
    return statuses[index]


def raise_errors(index, errors):
    """Process 1 fails first; the other one only because of that."""
    time.sleep(0.0 if index == 1 else 0.5)
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


def wait_for_a_signal(index, folder):
    """Leave word of each signal, and end in good order after the first."""
    received = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: received.append(number))
    (folder / f"{index}.pid").write_text(str(os.getpid()))
    while not received:
        time.sleep(0.01)
    time.sleep(0.3)
    (folder / f"{index}.txt").write_text(" ".join(signal.Signals(n).name for n in received))
    return 0


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
    assert run_processes(give, ([0, 7],), 2, first_rank=4) == 1
    assert "rank 5" in caplog.text
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


def test_a_killed_process_takes_the_others_down(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(processes, "_GRACE", 0.3)
    monkeypatch.setattr(processes, "_TERMINATION", 0.3)
    with caplog.at_level(logging.ERROR):
        assert run_processes(die, (tmp_path,), 2) == 1
    assert "rank 1" in caplog.text
    assert "SIGKILL" in caplog.text
    assert not is_alive(tmp_path / "0.pid")


def test_patience_is_less_than_a_minute():
    assert processes._GRACE + processes._TERMINATION < 45


@pytest.mark.parametrize(
    ("number", "to_group", "status", "received"),
    [
        (signal.SIGINT, True, 0, "SIGINT"),  # a terminal tells all of them
        (signal.SIGTERM, False, 143, "SIGTERM"),
        (signal.SIGKILL, False, -9, "SIGTERM"),
    ],
)
def test_signals_of_the_parent(tmp_path, number, to_group, status, received):
    program = (
        "from pathlib import Path\n"
        "from cascade_det.engine.processes import run_processes\n"
        "from tests.engine.test_processes import wait_for_a_signal\n"
        "if __name__ == '__main__':\n"
        f"    raise SystemExit(run_processes(wait_for_a_signal, (Path({str(tmp_path)!r}),), 2))\n"
    )
    (tmp_path / "program.py").write_text(program)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "program.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    wait_until(lambda: all((tmp_path / f"{i}.pid").exists() for i in (0, 1)))
    time.sleep(0.1)
    (os.killpg if to_group else os.kill)(parent.pid, number)
    assert parent.wait(timeout=60) == status
    wait_until(lambda: all((tmp_path / f"{i}.txt").exists() for i in (0, 1)))
    wait_until(lambda: not any(is_alive(tmp_path / f"{i}.pid") for i in (0, 1)))
    assert [(tmp_path / f"{i}.txt").read_text() for i in (0, 1)] == [received] * 2


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)

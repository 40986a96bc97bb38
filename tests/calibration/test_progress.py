"""How far a long work is: in the log where there is no terminal, by a clock that the test sets."""

import io
import logging
import sys

import pytest

from cascade_det.calibration.progress import SECONDS, progress_bar


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "cascade_det")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_line_from_time_to_time(lines, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    clock = Clock()
    with progress_bar("Doing it", 50, clock=clock) as step:
        for _ in range(40):
            clock.now += SECONDS / 10
            step()
    assert lines() == [f"Doing it: {done} of 50" for done in (10, 20, 30, 40)]
    assert sys.stderr.getvalue() == ""


def test_what_is_quick_says_nothing(lines):
    clock = Clock()
    with progress_bar("Doing it", 50, clock=clock) as step:
        clock.now += SECONDS * 0.9
        step(50)
    assert lines() == []


def test_a_bar_on_a_terminal(lines, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    clock = Clock()
    with progress_bar("Doing it", 4, clock=clock) as step:
        clock.now += 10 * SECONDS
        step(2)
    assert "Doing it" in terminal.getvalue()
    assert "/4" in terminal.getvalue()
    assert lines() == []

"""Signals as a wish: what they mean when they come once, twice, and of two kinds."""

import os
import signal

import pytest

from cascade_det.parallel.interrupts import interrupt_request

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
SCHEDULERS = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "numbers",
    [
        *([INT], [TERM], [TERM, TERM, TERM], [INT, TERM, TERM], [TERM, INT]),
        *([HUP], [HUP, TERM, HUP], *([number, number] for number in SCHEDULERS)),
    ],
)
def test_one_wish_however_often_it_comes(caplog, numbers):
    with interrupt_request() as request:
        assert not request
        send(*numbers)
        assert request
    assert len(caplog.records) == 1
    assert numbers[0].name in caplog.text


@pytest.mark.parametrize("before", [[INT], [TERM, INT], [INT, TERM]])
def test_the_second_ctrl_c_means_haste(before):
    with interrupt_request() as request:
        send(*before)
        with pytest.raises(KeyboardInterrupt):
            send(INT)
        assert request


@pytest.mark.parametrize("number", [INT, TERM])
def test_what_is_ended_at_once_can_still_save(number):
    with interrupt_request() as request:
        request.immediate = True
        with pytest.raises(KeyboardInterrupt):
            send(number)
        assert request
        send(TERM)


def test_what_is_ignored_stays_ignored():
    """As by nohup."""
    before = signal.signal(HUP, signal.SIG_IGN)
    try:
        with interrupt_request() as request:
            send(HUP)
            assert not request
        assert signal.getsignal(HUP) is signal.SIG_IGN
    finally:
        signal.signal(HUP, before)


@pytest.mark.parametrize("number", SCHEDULERS)
def test_what_the_program_around_handles_stays_its_own(number):
    seen = []
    before = signal.signal(number, lambda *_: seen.append(number))
    try:
        with interrupt_request() as request:
            send(number)
            assert not request
        assert seen == [number]
    finally:
        signal.signal(number, before)


def test_signals_mean_again_what_they_did():
    numbers = [INT, TERM, HUP, *SCHEDULERS]
    before = [signal.getsignal(number) for number in numbers]
    with interrupt_request():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before

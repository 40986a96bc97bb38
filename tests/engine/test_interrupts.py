"""Signals as a wish: what they mean when they come once, twice, and of two kinds."""

import os
import signal

import pytest

from cascade_det.engine.interrupts import interrupt_request

INT, TERM = signal.SIGINT, signal.SIGTERM


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "numbers", [[INT], [TERM], [TERM, TERM, TERM], [INT, TERM, TERM], [TERM, INT]]
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

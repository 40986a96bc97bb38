"""Order, memory, errors and ends of the pipeline, with sources that count."""

import threading
import weakref

import numpy as np
import pytest

from cascade_det.streams.frames import BadFrame, Frame
from cascade_det.streams.pipeline import PartTimes, detect_in
from cascade_det.streams.threads import Background, Worker


class Counted:
    """A source of N frames that knows how many of them are in memory."""

    live, origins = False, ()

    def __init__(self, length, bad=(), error_at=None):
        self.length, self.bad, self.error_at = length, bad, error_at
        self.alive, self.most, self.closed = 0, 0, False
        self._lock = threading.Lock()

    def frames(self):
        try:
            for number in range(self.length):
                if number == self.error_at:
                    raise OSError("the disk is gone")
                yield BadFrame(self, "broken", number) if number in self.bad else self.made(number)
        finally:
            self.closed = True

    def made(self, number):
        pixels = np.full((8, 8, 3), number % 256, np.uint8)
        with self._lock:
            self.alive += 1
            self.most = max(self.most, self.alive)
        weakref.finalize(pixels, self.gone)
        return Frame(self, pixels, number, number / 10)

    def gone(self):
        with self._lock:
            self.alive -= 1


class Predictor:
    batch_size = 4

    def __init__(self):
        self.batches = []

    def __call__(self, images, *, names):
        self.batches.append(len(images))
        return [int(image[0, 0, 0]) for image in images]


def test_order_batches_and_broken_frames():
    predictor, times = Predictor(), PartTimes()
    found = list(detect_in(predictor, [Counted(10, bad=(2, 9)), Counted(3)], times=times))
    bad = [entry.number for entry in found if isinstance(entry, BadFrame)]
    good = [(e[0].number, e[1]) for e in found if not isinstance(e, BadFrame)]
    assert bad == [2, 9]
    assert good == [(n, n) for n in (0, 1, 3, 4, 5, 6, 7, 8, 0, 1, 2)]
    assert predictor.batches == [3, 4, 1, 3]
    assert set(times.milliseconds(13)) == {"read", "detect"}


def test_memory_does_not_grow_with_the_stream():
    source, seen = Counted(2000), 0

    def write(entry):
        nonlocal seen
        seen += 1

    with Worker(write, 4) as worker:
        for entry in detect_in(Predictor(), [source]):
            worker.put(entry)
            del entry
    assert seen == 2000
    # Batches of four: waiting, detected in, and waiting to be written, and one in each hand.
    assert source.most <= 3 * 4 + 6
    assert source.alive == 0


def test_an_error_of_reading_ends_the_stream_with_its_message():
    source, found = Counted(100, error_at=9), []
    with pytest.raises(OSError, match="the disk is gone"):
        found += detect_in(Predictor(), [source])
    assert source.closed


def test_an_error_of_a_worker_reaches_who_puts():
    done = []

    def fail(item):
        if item == 5:
            raise ValueError("no room")
        done.append(item)

    worker = Worker(fail, 2)

    def put_all():
        with worker:
            for item in range(1000):
                worker.put(item)

    with pytest.raises(ValueError, match="no room"):
        put_all()
    assert done == [0, 1, 2, 3, 4]


def test_a_worker_finishes_what_it_has_when_its_caller_fails():
    done = []

    def put_some():
        with Worker(done.append, 3) as worker:
            for item in range(7):
                worker.put(item)
            raise KeyError("caller")

    with pytest.raises(KeyError):
        put_some()
    assert done == list(range(7))


def test_a_caller_that_stops_early_ends_the_thread():
    source = Counted(10**9)
    before = threading.active_count()
    stream = detect_in(Predictor(), [source])
    assert next(stream)[1] == 0
    stream.close()
    assert source.closed
    assert threading.active_count() == before


def test_the_newest_item_waits_where_they_come_too_fast():
    taken, all_made = threading.Event(), threading.Event()

    def items():
        yield 0
        taken.wait(10)
        yield from range(1, 50)
        all_made.set()

    background = Background(items(), 1, newest=True)
    with background as frames:
        assert next(frames) == 0
        taken.set()
        assert all_made.wait(10)
        assert list(frames) == [49]
    assert background.dropped == 48


def test_a_source_with_nothing_can_be_left():
    def nothing():
        while True:
            yield None

    before = threading.active_count()
    with Background(nothing(), 1):
        pass
    assert threading.active_count() == before

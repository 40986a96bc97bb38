"""Calls of one detector in several threads at once: each is as if it were alone.

Nothing depends on luck: while a call is between two of its steps, another thread runs a whole one.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from region_views import policy
from small_cascades import assert_same_detections
from small_detectors import make_detector, random_image

from cascade_det.core import PartTimer

BATCHES = [
    [{"image": random_image(96, 128, seed=1)}, {"image": random_image(64, 96, seed=2)}],
    [{"image": random_image(128, 160, seed=3)}],
]
EXITS = {
    "off": None,
    "rules": {"prune_thresholds": (0.3, 0.0), "redundancy_iou": 0.9, "region_budget": (30, 9, 4)},
    # By the clock below, two stages of the first batch and one of the second.
    "time": {"time_budget_ms": 2.3},
}


class Ticks:
    """A clock that goes on by a millisecond whenever it is read; each thread has its own."""

    def __init__(self):
        self.readings = {}

    def __call__(self):
        own = threading.get_ident()
        self.readings[own] = self.readings.get(own, 0) + 1
        return self.readings[own] / 1000


@pytest.mark.parametrize("exits", EXITS)
def test_a_call_is_the_same_with_another_one_between_its_steps(exits):
    detector, steps, others = make_detector(num_stages=3), [], []
    if EXITS[exits] is not None:
        clock = {"clock": Ticks()} if exits == "time" else {}
        detector.set_exits(policy(**EXITS[exits], **clock))

    def call(batch):
        timer = PartTimer()
        output = detector.detect(BATCHES[batch], stages=True, timer=timer)
        return output, timer

    call(0)  # how long it takes to report is known from then on
    alone = [call(0), call(1)]
    with ThreadPoolExecutor(1) as pool:

        def between(*_):
            if threading.current_thread() is threading.main_thread():
                steps.append(len(others))
                others.append(pool.submit(call, 1).result())

        for part in (detector.backbone, detector.cascade.pooler):
            part.register_forward_hook(between)
        mine = call(0)
    assert len(steps) > 4
    pairs = [(mine, alone[0]), *((other, alone[1]) for other in others)]
    for (output, timer), (expected, alone_timer) in pairs:
        assert_same_detections(output.detections, expected.detections, exact=True)
        for stage, wanted in zip(output.stages, expected.stages, strict=True):
            assert_same_detections(stage.detections, wanted.detections, exact=True)
        assert output.stats.entered == expected.stats.entered
        assert output.stats.left == expected.stats.left
        assert output.stats.confidence == expected.stats.confidence
        assert output.stats.overrun_ms == pytest.approx(expected.stats.overrun_ms)
        assert output.stats.milliseconds is timer.milliseconds
        assert timer.milliseconds.keys() == alone_timer.milliseconds.keys()
    if exits == "time":
        assert [n > 0 for n in mine[0].stats.entered] == [True, True, False]
        assert [n > 0 for n in others[0][0].stats.entered] == [True, False, False]

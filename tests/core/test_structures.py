"""Detections behave as one list; the timer adds up."""

import time

import pytest
import torch

from cascade_det.core import Detections, PartTimer


def some_detections():
    return Detections(
        torch.arange(12.0).view(3, 4),
        torch.tensor([0.9, 0.5, 0.2]),
        torch.tensor([2, 0, 1]),
        torch.tensor([0, 2, 1]),
    )


@pytest.mark.parametrize(
    "index", [torch.tensor([2, 0]), torch.tensor([True, False, True]), slice(1, 3)]
)
def test_detections_are_indexed_together(index):
    detections = some_detections()
    part = detections[index]
    assert len(detections) == 3
    assert len(part) == 2
    for name in ("boxes", "scores", "classes", "exit_stages"):
        assert torch.equal(getattr(part, name), getattr(detections, name)[index])


def test_detections_move_together():
    moved = some_detections().to("meta")
    for name in ("boxes", "scores", "classes", "exit_stages"):
        assert getattr(moved, name).device.type == "meta"


def test_timer_adds_the_parts_up(monkeypatch):
    clock = iter([0.0, 0.5, 2.0, 2.25, 7.0, 8.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timer = PartTimer()
    for name in ("rpn", "stage0", "rpn"):
        with timer.part(name):
            pass
    assert timer.milliseconds == {"rpn": 1500.0, "stage0": 250.0}


def test_timer_waits_for_the_gpu_at_both_ends(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    with PartTimer("cuda:1").part("stage0"):
        assert len(waits) == 1
    assert waits == [torch.device("cuda:1")] * 2
    with PartTimer("cpu").part("stage0"):
        pass
    assert len(waits) == 2

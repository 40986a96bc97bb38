"""Numbers of moving objects, by the package trackers where it is installed."""

import random
from dataclasses import dataclass

import numpy as np
import pytest

from cascade_det.onnx_predictor import ArrayDetections
from cascade_det.streams.frames import Frame
from cascade_det.streams.tracking import TRACKERS, Tracking

pytest.importorskip("trackers")
pytest.importorskip("supervision")

PIXELS = np.zeros((8, 8, 3), np.uint8)


@dataclass(frozen=True, eq=False)
class Clip:
    stem: str = "clip"
    rate: float = 25.0


def numbers_in(tracking, clip, dice):
    """The numbers of two objects that move apart, by object, frame by frame."""
    found = {0: [], 1: []}
    for number in range(20):
        boxes = {0: (10 + 2 * number, 10, 40 + 2 * number, 50), 1: (200 - 2 * number, 80, 240, 120)}
        objects = dice.sample([0, 1], 2)
        detections = ArrayDetections(
            boxes=np.array([boxes[o] for o in objects], np.float32),
            scores=np.array([0.9 - 0.1 * o for o in objects], np.float32),
            classes=np.zeros(2, np.int64),
            exit_stages=np.zeros(2, np.int64),
        )
        frame = Frame(clip, PIXELS, number, number / clip.rate)
        for one, given in zip(objects, tracking.of(frame, detections), strict=True):
            found[one].append(given)
    return found


@pytest.mark.parametrize("name", TRACKERS)
def test_objects_keep_their_numbers_whatever_their_order(name):
    tracking, dice = Tracking(name, 0.5), random.Random(0)
    for clip in (Clip(), Clip()):  # numbers begin again
        found = numbers_in(tracking, clip, dice)
        settled = [found[one][5:] for one in (0, 1)]
        assert sorted(numbers[0] for numbers in settled) == [0, 1]
        assert all(set(numbers) == {numbers[0]} for numbers in settled)


def test_an_uncertain_object_gets_no_number():
    tracking, clip = Tracking("sort", 0.5), Clip()
    for number in range(8):
        detections = ArrayDetections(
            boxes=np.array([[10, 10, 40, 50]], np.float32),
            scores=np.array([0.3], np.float32),
            classes=np.zeros(1, np.int64),
            exit_stages=np.zeros(1, np.int64),
        )
        assert tracking.of(Frame(clip, PIXELS, number, number / 25), detections) == [None]

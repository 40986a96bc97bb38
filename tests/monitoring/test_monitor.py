"""Exits in production: what a monitor counts, which images it shadows, and what it writes."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch

from cascade_det.core.structures import CascadeStats, Detections, DetectorOutput, StageOutput
from cascade_det.monitoring.monitor import ExitMonitor
from cascade_det.monitoring.shadow import ShadowRules


def some_detections(count):
    corner = torch.arange(count, dtype=torch.float32)[:, None] * 150
    boxes = torch.cat(
        [corner, torch.zeros(count, 1), corner + 100, torch.full((count, 1), 90.0)], 1
    )
    zeros = torch.zeros(count, dtype=torch.int64)
    return Detections(boxes, torch.full((count,), 0.9), zeros, zeros)


class FakeDetector:
    """Its full cascade finds four things in every image; with exits some, as the sample says.

    Attributes:
        shadowed: names of the images that ran the full cascade.
        asked: ``stages`` of each call.
    """

    def __init__(self):
        self.shadowed, self.asked = [], []

    def detect(self, batch, *, stages=False, timer=None):
        self.asked.append(stages)
        found = [some_detections(4 - sample.get("lost", 0)) for sample in batch]
        stats = CascadeStats(
            [10 * len(batch), 4 * len(batch)],
            [{"background": 6 * len(batch)}, {"completed": 4 * len(batch)}],
            proposed=12 * len(batch),
            left_before={"background": 2 * len(batch)},
            confidence=[{"background": 0.06 * len(batch)}, {"completed": 3.0 * len(batch)}],
        )
        output = DetectorOutput(found, stats)
        chosen = [stages] * len(batch) if isinstance(stages, bool) else stages
        if any(chosen):
            full = [some_detections(4 if wanted else 0) for wanted in chosen]
            output.stages = [StageOutput(full, [], [])]
            self.shadowed += [s.get("file_name") for s, c in zip(batch, chosen, strict=True) if c]
        return output


def batches(lost, size=4):
    samples = [{"file_name": f"{i}.jpg", "lost": value} for i, value in enumerate(lost)]
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_detections_are_those_of_the_detector_and_stages_only_where_asked():
    detector = FakeDetector()
    monitor = ExitMonitor(detector, shadow=ShadowRules(share=1.0))
    (batch,) = batches([0, 1])
    output = monitor.detect(batch)
    assert [len(found) for found in output.detections] == [4, 3]
    assert output.stages is None
    assert len(monitor.detect(batch, stages=True).stages[0].detections[1]) == 4
    assert detector.asked == [[True, True], True]
    one = monitor.detect(batch, stages=[False, True])
    assert one.stages is not None
    # Without shadow runs the detector is called as the caller calls.
    off = ExitMonitor(detector)
    off.detect(batch)
    off.detect(batch, stages=[True, False])
    assert detector.asked[-2:] == [False, [True, False]]
    assert off.report()["shadow"]["images"] == 0
    assert monitor.report()["shadow"]["images"] == 6


@pytest.mark.parametrize("size", [1, 3, 50])
def test_the_same_images_are_shadowed_whatever_the_batches(size):
    rules = ShadowRules(share=0.3)
    expected = [f"{i}.jpg" for i in range(50) if rules.chooses(f"{i}.jpg")]
    detector = FakeDetector()
    monitor = ExitMonitor(detector, shadow=rules)
    for batch in batches([i % 3 for i in range(50)], size):
        monitor.detect(batch)
    assert detector.shadowed == expected
    shadow = monitor.report()["shadow"]
    losses = [int(name.removesuffix(".jpg")) % 3 / 4 for name in expected]
    assert shadow["images"] == len(expected)
    assert shadow["loss"] == pytest.approx(sum(losses) / len(losses))


def test_images_without_a_name_are_chosen_by_their_number():
    detector = FakeDetector()
    rules = ShadowRules(share=0.3)
    monitor = ExitMonitor(detector, shadow=rules)
    for size in (3, 1, 16):
        monitor.detect([{} for _ in range(size)])
    wanted = sum(rules.chooses(number) for number in range(20))
    assert monitor.report()["shadow"]["images"] == wanted > 2


def test_counters():
    monitor = ExitMonitor(FakeDetector())
    for batch in batches([0] * 6):
        monitor.detect(batch)
    exits = monitor.report()["exits"]
    assert exits["images"] == monitor.images == 6
    assert exits["stage1"]["entered"] == 24
    assert exits["stage0"]["mean_score"]["background"] == pytest.approx(0.01)
    assert exits["proposals"]["left"] == {"background": pytest.approx(1 / 6)}
    monitor.reset()
    assert monitor.report()["exits"]["images"] == monitor.images == 0


def test_drift_is_told_once_and_ends_with_the_window(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="cascade_det.monitoring.shadow")
    reports = []
    monitor = ExitMonitor(
        FakeDetector(),
        shadow=ShadowRules(share=1.0, expected_loss=0.02),
        window=40,
        on_drift=reports.append,
        output_dir=tmp_path,
    )
    for batch in batches([0] * 40 + [2] * 40 + [0] * 60):
        monitor.detect(batch)
    monitor.close()
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.INFO]
    (report,) = reports
    assert report["shadow"]["drift"] == 1
    assert 40 < report["exits"]["images"] < 80
    assert not monitor.drifted
    lines = lines_of(tmp_path)
    assert [line["shadow/drift"] for line in lines] == [1, 0, 0]
    assert lines[-1]["iteration"] == 140
    assert lines[-1]["shadow/images"] == 40


def test_no_drift_where_calibration_promised_as_much():
    rules = ShadowRules(share=1.0, expected_loss=0.25)
    monitor = ExitMonitor(FakeDetector(), shadow=rules, on_drift=pytest.fail)
    for batch in batches([1] * 200):
        monitor.detect(batch)
    assert not monitor.drifted
    assert monitor.report()["shadow"]["loss_low"] == pytest.approx(0.25, abs=0.1)


def test_reset_ends_the_drift():
    calls = []
    rules = ShadowRules(share=1.0, expected_loss=0.02)
    monitor = ExitMonitor(FakeDetector(), shadow=rules, on_drift=calls.append)
    for batch in batches([2] * 40):
        monitor.detect(batch)
    assert monitor.drifted
    monitor.reset()
    assert not monitor.drifted
    for batch in batches([2] * 40):
        monitor.detect(batch)
    assert len(calls) == 2


def test_a_line_after_every_period_and_at_the_end(tmp_path):
    folder = tmp_path / "new"
    with ExitMonitor(FakeDetector(), output_dir=folder, period=8) as monitor:
        assert not folder.exists()
        for batch in batches([0] * 22):
            monitor.detect(batch)
    lines = lines_of(folder)
    assert [line["iteration"] for line in lines] == [8, 16, 22]
    assert [line["exits/images"] for line in lines] == [8, 16, 22]
    assert lines[0]["shadow/loss"] is None
    monitor.close()
    with ExitMonitor(FakeDetector(), output_dir=folder) as another:
        another.detect([{}])
    assert [line["iteration"] for line in lines_of(folder)] == [8, 16, 22, 1]


def test_nothing_is_written_where_nothing_was_seen_or_no_folder_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ExitMonitor(FakeDetector(), output_dir=tmp_path / "out"):
        pass
    with ExitMonitor(FakeDetector(), period=1) as monitor:
        monitor.detect([{}])
    assert list(tmp_path.iterdir()) == []


def test_a_detector_without_stages_can_have_no_shadow_runs(monkeypatch):
    detector = FakeDetector()
    plain = detector.detect
    monkeypatch.setattr(detector, "detect", lambda batch, **_: plain(batch))
    ExitMonitor(detector).detect([{}])
    with pytest.raises(ValueError, match="no stages"):
        ExitMonitor(detector, shadow=ShadowRules(share=1.0)).detect([{}])


def test_threads_lose_no_count(tmp_path, monkeypatch):
    """While one call is added up, another one waits, or would spoil the sums."""
    monitor = ExitMonitor(FakeDetector(), shadow=ShadowRules(share=1.0), output_dir=tmp_path)
    add_up, first_is_in, second_is_in = monitor._exits.process, Event(), Event()

    def slowly(batch, output):
        if first_is_in.is_set():
            second_is_in.set()
        else:
            first_is_in.set()
            assert not second_is_in.wait(0.1), "two calls are added up at once"
        add_up(batch, output)

    monkeypatch.setattr(monitor._exits, "process", slowly)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(monitor.detect, [{"lost": 1}] * 3)]
        assert first_is_in.wait(5)
        calls.append(pool.submit(monitor.detect, [{"lost": 1}] * 2))
        for call in calls:
            call.result()
    report = monitor.report()
    assert report["exits"]["images"] == report["shadow"]["images"] == monitor.images == 5


def test_images_of_two_calls_at_once_have_numbers_of_their_own(monkeypatch):
    detector, keys = FakeDetector(), []
    monitor = ExitMonitor(detector)
    plain = detector.detect

    def number_of(sample, number):
        keys.append(number)
        return number

    def with_another_call(batch, **arguments):
        if len(batch) == 3:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(monitor.detect, [{}, {}]).result()
        return plain(batch, **arguments)

    monkeypatch.setattr("cascade_det.monitoring.monitor.image_key", number_of)
    monkeypatch.setattr(detector, "detect", with_another_call)
    monitor.detect([{}] * 3)
    assert keys == [0, 1, 2, 3, 4]
    assert monitor.images == 5


def test_the_callback_may_wait_for_a_thread_that_uses_the_monitor():
    told = []

    def tell(report):
        with ThreadPoolExecutor(1) as pool:
            told.append(pool.submit(monitor.report).result(5))

    rules = ShadowRules(share=1.0, expected_loss=0.02)
    monitor = ExitMonitor(FakeDetector(), shadow=rules, on_drift=tell)
    for batch in batches([2] * 40):
        monitor.detect(batch)
    assert [report["shadow"]["drift"] for report in told] == [1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_counts_for_itself(copied):
    rules = ShadowRules(share=1.0, expected_loss=0.02)
    monitor = ExitMonitor(FakeDetector(), shadow=rules)
    another = copied(monitor)
    for batch in batches([2] * 40):
        another.detect(batch)
    assert another.drifted
    assert (another.images, monitor.images) == (40, 0)
    assert not monitor.drifted


@pytest.mark.parametrize("wrong", [{"window": 0}, {"period": 0}])
def test_numbers_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        ExitMonitor(FakeDetector(), **wrong)

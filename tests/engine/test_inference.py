import io
import logging
import sys

import pytest
import torch

from cascade_det.core.modes import in_evaluation_mode
from cascade_det.core.structures import StageOutput
from cascade_det.engine import inference
from cascade_det.engine.inference import run_inference


class Collect:
    """Keeps what it is given."""

    def __init__(self, name="toy"):
        self.name, self.seen = name, []

    def process(self, batch, output):
        self.seen.append((batch, output))

    def evaluate(self):
        return {self.name: {"batches": len(self.seen)}}


def batches(loader, count):
    return [batch for batch, _ in zip(loader, range(count), strict=False)]


def test_every_batch_reaches_every_evaluator_in_order(make_detector, make_loader):
    loader, one, two = batches(make_loader(), 3), Collect("one"), Collect("two")
    results = run_inference(make_detector(), loader, [one, two])
    assert results == {"one": {"batches": 3}, "two": {"batches": 3}}
    for evaluator in (one, two):
        for (seen, output), batch in zip(evaluator.seen, loader, strict=True):
            assert seen is batch
            assert len(output.detections) == len(batch)


def test_modes_of_all_modules_are_as_before(make_detector, make_loader):
    detector = make_detector().train()
    detector.body[1].eval()  # a frozen norm
    modes = [module.training for module in detector.modules()]
    run_inference(detector, batches(make_loader(), 2), [Collect()])
    assert detector.modes == [False] * 3
    assert [module.training for module in detector.modules()] == modes

    class Fails(Collect):
        def process(self, batch, output):
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run_inference(detector, batches(make_loader(), 2), [Fails()])
    assert [module.training for module in detector.modules()] == modes


def test_times_after_one_untimed_call(make_detector, make_loader):
    detector, evaluator = make_detector(), Collect()
    run_inference(detector, batches(make_loader(), 2), [evaluator])
    assert len(detector.modes) == 3
    assert [list(output.stats.milliseconds) for _, output in evaluator.seen] == [["backbone"]] * 2


def test_gradients_and_stages(make_detector, make_loader):
    seen = []

    class Looks(make_detector):
        @in_evaluation_mode
        def detect(self, batch, *, stages=False, timer=None):
            output = super().detect(batch, timer=timer)
            result = self.head(self.body(torch.ones(2, 4)))
            seen.append((result.requires_grad, stages))
            output.stages = [StageOutput(output.detections, [], [])] if stages else None
            return output

    loader, evaluator = batches(make_loader(), 1), Collect()
    run_inference(Looks(), loader, [evaluator], stages=True)
    run_inference(Looks(), loader, [evaluator])
    assert seen == [(False, True)] * 2 + [(False, False)] * 2
    assert [len(output.stages or []) for _, output in evaluator.seen] == [1, 0]


def test_empty_loader(make_detector, caplog):
    detector = make_detector()
    assert run_inference(detector, [], [Collect()]) == {"toy": {"batches": 0}}
    assert detector.modes == []
    assert "loader is empty" in caplog.text


def test_two_results_of_one_name(make_detector):
    with pytest.raises(ValueError, match="toy"):
        run_inference(make_detector(), [], [Collect(), Collect()])


def test_progress_is_a_bar_on_a_terminal(make_detector, make_loader, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    run_inference(make_detector(), batches(make_loader(), 3), [])
    assert "inference" in screen.getvalue()


def test_progress_is_log_lines_elsewhere(make_detector, make_loader, monkeypatch, caplog, capsys):
    monkeypatch.setattr(inference, "_LOG_SECONDS", 0.0)
    with caplog.at_level(logging.INFO):
        run_inference(make_detector(), batches(make_loader(), 3), [])
    assert "1 of 3 batches" in caplog.text
    assert "2 of 3 batches" in caplog.text
    assert "Inference on 12 images" in caplog.text
    assert capsys.readouterr().err == ""

import io
import json
import logging
import math
import sys

import pytest
import torch
from toy_detectors import make_trainer

from cascade_det.engine.history import WINDOW, History
from cascade_det.engine.hooks import EvalHook, Hook, WriterHook
from cascade_det.engine.log import setup_logging
from cascade_det.engine.step import mean_metrics
from cascade_det.engine.writers import ConsoleWriter, JsonWriter, TensorBoardWriter, Writer


def filled(losses=(3.0, 1.0, 2.0)):
    history = History()
    for history.iteration, loss in enumerate(losses):
        history.put("total_loss", loss)
        history.put("lr", 0.1 * (history.iteration + 1), smooth=False)
    return history


def rows(path):
    def refuse(constant):
        raise ValueError(f"{constant} is not json")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def train(detector, loader, hooks, max_iter=6, start_iter=0):
    make_trainer(
        detector,
        loader,
        max_iter=max_iter,
        start_iter=start_iter,
        lr=0.01,
        steps=(),
        warmup=0,
        hooks=hooks,
    ).train()


def test_history_smooths_what_is_noisy():
    history = filled()
    assert history.latest("total_loss") == (2.0, 2)
    assert history.smoothed("total_loss") == 2.0
    assert history.smoothed("lr") == pytest.approx(0.3)
    history.put("total_loss", 100.0)
    assert history.smoothed("total_loss") == 2.5
    assert history.mean("total_loss") == 26.5
    long = filled([1000.0] * 30 + [1.0] * WINDOW)
    assert long.smoothed("total_loss") == 1.0
    assert "loss" not in history
    assert list(history) == ["total_loss", "lr"]


def test_history_comes_back_from_its_state():
    history = filled([float(i) for i in range(50)])
    state = json.loads(json.dumps(history.state_dict()))
    other = History()
    other.put("stale", 1.0)
    other.iteration = 50
    other.load_state_dict(state)
    assert list(other) == list(history)
    assert other.latest("lr") == history.latest("lr")
    assert other.median("total_loss") == history.median("total_loss")
    assert other.iteration == 50


def test_means_over_parts_hide_no_broken_loss_and_leave_out_metrics_without_value():
    nan = math.nan
    parts = [
        {"loss_a": torch.tensor(1.0), "loss_b": torch.tensor(nan), "accuracy": nan, "none": nan},
        {"loss_a": torch.tensor(3.0), "loss_b": torch.tensor(2.0), "accuracy": 0.5, "none": nan},
    ]
    found = mean_metrics(parts, {"gradient_norm": 7.0}, torch.device("cpu"))
    expected = {"loss_a": 2.0, "loss_b": nan, "accuracy": 0.5, "none": nan, "gradient_norm": 7.0}
    assert found == pytest.approx(expected, nan_ok=True)


def test_json_lines_hold_what_is_new(tmp_path):
    path = tmp_path / "deep" / "metrics.json"
    history = filled()
    writer = JsonWriter(path)
    writer.write(history)
    writer.write(history)
    history.put("bbox/AP", math.nan, smooth=False)  # same iteration, found later
    writer.write(history)
    writer.close()
    assert rows(path) == [
        {"iteration": 2, "lr": pytest.approx(0.3), "total_loss": 2.0},
        {"iteration": 2, "bbox/AP": None},
    ]
    assert path.read_text().splitlines()[0].startswith('{"iteration": 2, "lr": 0.3')


def test_a_resumed_run_takes_back_later_lines_and_writes_nothing_twice(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 1}\n{"iteration": 2}\n{"iteration": 3}\n{"iterat')
    history = History()
    history.load_state_dict(filled().state_dict())
    history.iteration = 3
    history.put("lr", 0.5, smooth=False)
    writer = JsonWriter(path)
    writer.resume(2)
    writer.write(history)
    writer.close()
    assert rows(path) == [{"iteration": 1}, {"iteration": 2}, {"iteration": 3, "lr": 0.5}]


def test_metrics_of_a_run(make_detector, make_loader, tmp_path):
    path = tmp_path / "metrics.json"
    hooks = [
        EvalHook(3, lambda: {"bbox": {"AP": 12.5}}),
        WriterHook([JsonWriter(path)], period=2),
    ]
    train(make_detector(), make_loader(), hooks)
    found = rows(path)
    assert [row["iteration"] for row in found] == [1, 2, 3, 5, 5]
    scalars = {"total_loss", "loss_square", "loss_abs", "toy/error", "lr", "time", "data_time"}
    scalars.add("gradient_norm")
    for row in (found[0], found[2], found[3]):
        assert row.keys() == scalars | {"iteration", "eta_seconds"}
        assert all(math.isfinite(value) for value in row.values())
    assert found[1] == {"iteration": 2, "bbox/AP": 12.5}
    assert found[4] == {"iteration": 5, "bbox/AP": 12.5}
    assert found[0]["eta_seconds"] > found[3]["eta_seconds"] == 0


def test_writers_are_flushed_and_closed_after_an_error(make_detector, make_loader, tmp_path):
    class Fail(Hook):
        def after_step(self, trainer):
            if trainer.iteration == 2:
                raise KeyboardInterrupt

    closed = []

    class Closing(Writer):
        def close(self):
            closed.append(True)

    path = tmp_path / "metrics.json"
    hooks = [Fail(), WriterHook([JsonWriter(path), Closing()], period=100)]
    with pytest.raises(KeyboardInterrupt):
        train(make_detector(), make_loader(), hooks)
    assert rows(path)[-1]["iteration"] == 2
    assert closed == [True]


def test_nothing_is_written_for_an_iteration_that_failed(
    make_detector, make_loader, tmp_path, caplog
):
    path = tmp_path / "metrics.json"
    batches = [batch for batch, _ in zip(make_loader(), range(3), strict=False)]
    hooks = [WriterHook([JsonWriter(path), ConsoleWriter(6)], period=2)]
    with caplog.at_level(logging.INFO), pytest.raises(RuntimeError, match="iteration 3"):
        train(make_detector(), batches, hooks)
    assert [row["iteration"] for row in rows(path)] == [1, 2]
    assert "iter: 2" in caplog.text
    assert "iter: 3" not in caplog.text


def test_tensorboard_files_hold_the_scalars(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = filled()
    writer = TensorBoardWriter(tmp_path)
    writer.resume(-1)
    writer.write(history)
    history.iteration = 3
    history.put("lr", 0.7, smooth=False)
    writer.write(history)
    writer.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("lr")]
    assert found == [(2, pytest.approx(0.3)), (3, pytest.approx(0.7))]
    assert [(event.step, event.value) for event in events.Scalars("total_loss")] == [(2, 2.0)]


def test_missing_tensorboard_is_one_log_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.INFO):
        writer = TensorBoardWriter(tmp_path / "tb")
        writer.resume(-1)
        writer.write(filled())
        writer.close()
    assert len(caplog.records) == 1
    assert "pip install tensorboard" in caplog.text
    assert not (tmp_path / "tb").exists()


def test_log_line_has_what_one_looks_for(make_detector, make_loader, caplog):
    with caplog.at_level(logging.INFO):
        hooks = [WriterHook([ConsoleWriter(6)], period=4)]
        train(make_detector(), make_loader(), hooks)
    lines = [r.message for r in caplog.records if r.name == "cascade_det.engine.progress"]
    assert len(lines) == 2
    fields = dict(field.split(": ", 1) for field in lines[0].split("  "))
    names = ["eta", "iter", "total_loss", "loss_square", "loss_abs", "time", "data_time", "lr"]
    assert list(fields)[: len(names)] == names
    assert fields["iter"] == "3"
    assert fields["eta"].startswith("0:00:0")
    assert fields["lr"] == "0.01"
    assert "iter: 5  " in lines[1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_terminal_gets_a_bar_and_the_file_gets_the_lines(
    make_detector, make_loader, tmp_path, monkeypatch, capsys
):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    setup_logging(tmp_path)
    hooks = [WriterHook([ConsoleWriter(6)], period=2)]
    train(make_detector(), make_loader(2), hooks, start_iter=2)
    assert "6/6" in screen.getvalue()
    assert "loss=" in screen.getvalue()
    assert "iter: 5" not in capsys.readouterr().out
    assert "iter: 5" in (tmp_path / "log.txt").read_text()


def test_elsewhere_there_are_lines_and_no_bar(make_detector, make_loader, tmp_path, capsys):
    setup_logging(tmp_path)
    train(make_detector(), make_loader(), [WriterHook([ConsoleWriter(6)], period=2)])
    captured = capsys.readouterr()
    assert "iter: 5" in captured.out
    assert captured.err == ""
    assert "iter: 5" in (tmp_path / "log.txt").read_text()


def test_logging_may_be_set_up_again(tmp_path, capsys):
    setup_logging(tmp_path / "a")
    setup_logging(tmp_path / "b")
    logging.getLogger("cascade_det.somewhere").info("hello")
    logging.getLogger("fvcore.common.checkpoint").info("there")
    logging.getLogger("cascade_det").debug("quiet")
    assert capsys.readouterr().out.count("hello") == 1
    assert (tmp_path / "a" / "log.txt").read_text() == ""
    text = (tmp_path / "b" / "log.txt").read_text()
    assert [line.rsplit(": ")[-1] for line in text.splitlines()] == ["hello", "there"]
    setup_logging(tmp_path / "b")
    logging.getLogger("cascade_det").info("again")
    lines = (tmp_path / "b" / "log.txt").read_text().splitlines()
    assert lines[:2] == text.splitlines()
    assert lines[2].endswith("cascade_det] INFO: again")

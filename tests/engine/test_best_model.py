"""Evaluation on the way: the best weights, patience, and what a resume makes of them."""

import json
import logging
import math

import pytest
import torch
from toy_detectors import make_resumable

from cascade_det.engine.best_model import BestModel
from cascade_det.engine.hooks import EvalHook, Hook, WriterHook
from cascade_det.engine.writers import JsonWriter


class Killed(BaseException):
    """Ends a run without any hook getting to save, as kill -9 does."""


class Kill(Hook):
    def __init__(self, at):
        self.at = at

    def after_step(self, trainer):
        if trainer.iteration == self.at:
            trainer.resumable = False
            raise Killed


def run(folder, detector, make_loader, hooks, *, period=2, **others):
    trainer = make_resumable(folder, detector, make_loader, hooks=hooks, period=period, **others)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("values", "patience", "stopped_at", "best"),
    [
        ([1, 2, 3, 4], 1, None, (4, 7)),
        ([3, 1, 2, 9], 2, 5, (3, 1)),
        ([3, 3, 9, 9], 1, 3, (3, 1)),
        ([1, math.nan, math.nan, 5], 2, 5, (1, 1)),
        ([math.nan, math.nan, 5, 6], 3, None, (6, 7)),
        ([3, 1, 4, 1], 2, None, (4, 5)),
        ([4, 3, 2, 1], 0, None, (4, 1)),
        ([-4, -3, -5, -6], 0, None, (-3, 3)),
        ([0, 0, 0, 0], 0, None, (0, 1)),
    ],
)
def test_best_weights_are_kept_and_patience_ends(
    make_detector, make_loader, caplog, tmp_path, values, patience, stopped_at, best
):
    left, weights = iter(values), {}

    def evaluate():
        weights[len(weights) * 2 + 1] = detector.head.weight.detach().clone()
        return {"bbox": {"AP": next(left)}}

    detector = make_detector()
    with caplog.at_level(logging.INFO):
        trainer = run(
            tmp_path,
            detector,
            make_loader,
            lambda c: [EvalHook(2, evaluate), BestModel(c, "bbox/AP", patience)],
            period=100,
        )
    assert trainer.finished
    assert trainer.iteration == (7 if stopped_at is None else stopped_at)
    assert ("CASCADE.PATIENCE" in caplog.text) == (stopped_at is not None)
    saved = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert (saved["metric"]["bbox/AP"], saved["iteration"]) == best
    assert torch.equal(saved["model"]["head.weight"], weights[best[1]])
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert final["iteration"] == trainer.iteration
    assert torch.equal(final["model"]["head.weight"], detector.head.weight)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.parametrize("name", ["total_loss", "loss_rpn_cls", "loss_box_reg_stage2"])
def test_of_a_loss_the_lowest_is_best(make_detector, make_loader, tmp_path, name):
    left = iter([3.0, 1.0, 2.0, 4.0])
    run(
        tmp_path,
        make_detector(),
        make_loader,
        lambda c: [
            EvalHook(2, lambda: {"validation": {name: next(left)}}),
            BestModel(c, f"validation/{name}"),
        ],
    )
    saved = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert saved["metric"] == {f"validation/{name}": 1.0}


@pytest.mark.parametrize("period", [1, 2, 3, 100])
def test_a_run_without_hope_stays_ended_until_the_patience_is_raised(
    make_detector, make_loader, tmp_path, caplog, period
):
    def train(patience, resume):
        return run(
            tmp_path,
            make_detector(),
            make_loader,
            lambda c: [EvalHook(1, lambda: {"AP": 1.0}), BestModel(c, "AP", patience)],
            resume=resume,
            period=period,
        )

    assert train(2, False).iteration == 2
    first = (tmp_path / "model_final.pth").read_bytes()
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    with caplog.at_level(logging.INFO):
        again = train(2, True)
    assert again.iteration == 2
    assert again.finished
    assert "Raise CASCADE.PATIENCE, 2 now" in caplog.text
    assert (tmp_path / "model_final.pth").read_bytes() == first
    assert train(4, True).iteration == 4
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 4


@pytest.mark.parametrize("killed_at", range(8))
@pytest.mark.parametrize("before_evaluation", [False, True])
def test_a_killed_run_finds_the_same_best_and_stops_at_the_same_place(
    make_detector, make_loader, tmp_path, killed_at, before_evaluation
):
    """Evaluations at 2, 5, 8, ... and checkpoints at 1, 3, 5, ...: all orders of the two occur."""
    value_at = {2: 3.0, 5: 7.0, 8: 6.0, 11: 5.0, 14: 9.0}
    seen = []

    def train(folder, *, resume=False, kill_at=None):
        def evaluate():
            seen.append(trained[0])
            return {"AP": value_at[trained[0]]}

        class Watch(Hook):
            def before_train(self, trainer):
                trained[0] = trainer.iteration

            after_step = before_train

        trained = [None]
        kill = [] if kill_at is None else [Kill(kill_at)]
        return run(
            folder,
            make_detector(),
            make_loader,
            lambda c: [
                *(kill if before_evaluation else []),
                Watch(),
                EvalHook(3, evaluate),
                BestModel(c, "AP", 2),
                WriterHook([JsonWriter(folder / "metrics.json")], period=2),
                *([] if before_evaluation else kill),
            ],
            resume=resume,
            max_iter=15,
        )

    torch.manual_seed(0)
    whole = train(tmp_path / "whole")
    assert seen == [2, 5, 8, 11]
    torch.manual_seed(0)
    with pytest.raises(Killed):
        train(tmp_path / "cut", kill_at=killed_at)
    torch.manual_seed(1)
    cut = train(tmp_path / "cut", resume=True)
    assert cut.iteration == whole.iteration == 11
    best = [torch.load(tmp_path / d / "model_best.pth") for d in ("whole", "cut")]
    torch.testing.assert_close(best[0], best[1], rtol=0, atol=0)
    assert best[0]["iteration"] == 5
    lines = [without_times(tmp_path / d / "metrics.json") for d in ("whole", "cut")]
    assert lines[0] == lines[1]


def without_times(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if "time" not in k and k != "eta_seconds"} for row in rows
    ]


def test_an_unknown_figure_is_named_once(make_detector, make_loader, caplog, tmp_path):
    trainer = run(
        tmp_path,
        make_detector(),
        make_loader,
        lambda c: [EvalHook(1, lambda: {"bbox": {"AP50": 1.0}}), BestModel(c, "bbox/AP", 1)],
    )
    assert trainer.iteration == 7
    assert caplog.text.count("CASCADE.BEST_METRIC 'bbox/AP'") == 1
    assert "bbox/AP50" in caplog.text


def test_another_metric_begins_anew(make_detector, make_loader, tmp_path):
    def train(metric, value, resume):
        return run(
            tmp_path,
            make_detector(),
            make_loader,
            lambda c: [EvalHook(2, lambda: {"A": value, "B": value}), BestModel(c, metric)],
            resume=resume,
            max_iter=4 if not resume else 8,
        )

    train("A", 9.0, False)
    train("B", 5.0, True)
    saved = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert saved["metric"] == {"B": 5.0}

"""Runs that are killed, at random moments and while they save, go on as if nothing had happened.

Each run is a forked process: torch is loaded once, and a kill is a kill.
"""

import contextlib
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from killed_runs import FORK, final_state, finish, quick_evaluation, start
from shape_runs import INSTANT, assert_same

from cascade_det.config import load_config
from cascade_det.engine.checkpoint import Checkpointer
from cascade_det.errors import CheckpointError
from cascade_det.standalone.train import train


def has_started(cfg):
    return (Path(cfg.OUTPUT_DIR) / "last_checkpoint").exists()


def in_folder(cfg, folder):
    other = cfg.clone()
    other.OUTPUT_DIR = str(folder)
    return other


@pytest.fixture(scope="module", autouse=True)
def _quick_runs():
    with contextlib.suppress(ImportError):
        import torch.utils.tensorboard  # once here, not in every process  # noqa: F401
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[train.__module__], "evaluate_all", quick_evaluation)
        yield


@pytest.fixture(scope="module")
def whole(shape_options, tmp_path_factory):
    """A configuration with evaluations on the way, what it trains without a kill, and how long."""
    cfg = load_config(INSTANT, shape_options)
    cfg.SOLVER.MAX_ITER = 8
    cfg.SOLVER.STEPS = ()
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    cfg.TEST.EVAL_PERIOD = 3
    cfg.CASCADE.EMA_DECAY = 0.9
    cfg.OUTPUT_DIR = str(tmp_path_factory.mktemp("runs") / "whole")
    began = time.perf_counter()
    assert finish(start(train, cfg)) == 0
    return cfg, final_state(cfg), time.perf_counter() - began


def metrics(cfg):
    lines = (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    timed = ("time", "eta", "latency", "ms")
    return [{k: v for k, v in row.items() if not any(t in k for t in timed)} for row in rows]


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_random_moments(whole, tmp_path, workers):
    cfg, expected, seconds = whole
    cut = in_folder(cfg, tmp_path / "cut")
    cut.DATALOADER.NUM_WORKERS = workers
    dice = random.Random(workers)
    killed = []
    # Less than a third of the whole each, unless the machine has become faster since.
    for wait in (dice.uniform(0.02, 0.32) * seconds for _ in range(3)):
        process = start(resume if has_started(cut) else train, cut)
        process.join(wait)
        process.kill()
        killed.append(finish(process))
    assert killed[0] == -signal.SIGKILL
    assert set(killed) <= {0, -signal.SIGKILL}
    assert finish(start(resume if has_started(cut) else train, cut)) == 0
    found = final_state(cut)
    assert_same(found, expected)
    assert metrics(cut) == metrics(cfg)
    best = [Path(c.OUTPUT_DIR) / "model_best.pth" for c in (cfg, cut)]
    assert_same(*(torch.load(file, weights_only=True) for file in best))
    leftovers = {p.name for p in Path(cut.OUTPUT_DIR).iterdir()} - {
        p.name for p in Path(cfg.OUTPUT_DIR).iterdir()
    }
    assert {name for name in leftovers if not name.startswith("events.out")} == set()


def resume(cfg):
    train(cfg, resume=True)


def killed_in_save(cfg, number, resumed):
    """Train, and die in the middle of writing checkpoint ``number`` of this process."""
    saved, save = [], torch.save

    def dying(data, path):
        saved.append(path)
        if len(saved) == number:
            Path(path).write_bytes(b"half of a checkpoint")
            os.kill(os.getpid(), signal.SIGKILL)
        save(data, path)

    torch.save = dying
    train(cfg, resume=resumed)


def test_killed_during_a_save(whole, tmp_path):
    cfg, expected, _ = whole
    cut = in_folder(cfg, tmp_path / "cut")
    assert finish(start(killed_in_save, cut, 1, False)) == -signal.SIGKILL
    assert not has_started(cut)
    assert finish(start(killed_in_save, cut, 2, False)) == -signal.SIGKILL
    for number in (1, 2, 3):
        assert finish(start(killed_in_save, cut, number, True)) == -signal.SIGKILL
    assert finish(start(resume, cut)) == 0
    assert_same(final_state(cut), expected)
    assert not list(Path(cut.OUTPUT_DIR).glob(".*.tmp"))


def killed_before_the_final_save(cfg):
    save = Checkpointer.save

    def dying(self, name, **arguments):
        if name == "model_final":
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, name, **arguments)

    Checkpointer.save = dying
    train(cfg)


def test_killed_between_the_two_saves_after_the_last_step(whole, tmp_path):
    cfg, expected, _ = whole
    cut = in_folder(cfg, tmp_path / "cut")
    assert finish(start(killed_before_the_final_save, cut)) == -signal.SIGKILL
    assert (tmp_path / "cut" / "last_checkpoint").read_text() == "model_0000007.pth"
    assert finish(start(resume, cut)) == 0
    assert_same(final_state(cut), expected)
    assert metrics(cut) == metrics(cfg)


def test_killed_again_and_again_before_the_first_checkpoint_with_a_drawn_seed(whole, tmp_path):
    cut = in_folder(whole[0], tmp_path / "cut")
    cut.SEED = -1
    cut.CASCADE.EMA_DECAY = 0.0
    for resumed in (False, True, True):
        assert finish(start(killed_in_save, cut, 2, resumed)) == -signal.SIGKILL
        assert (tmp_path / "cut" / "last_checkpoint").read_text() == "model_start.pth"
    assert finish(start(resume, cut)) == 0
    found = final_state(cut)
    again = in_folder(cut, tmp_path / "again")
    again.SEED = found["run"]["seed"]
    assert finish(start(train, again)) == 0
    assert_same(found, final_state(again))


def fills_the_disk(folder, size, messages):
    """Save a checkpoint that is larger than the largest file this process may write."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    model = torch.nn.Linear(500, 500)
    try:
        Checkpointer(model, folder).save("model_0000009", iteration=9)
    except CheckpointError as error:
        messages.put(str(error))


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    model = torch.nn.Linear(500, 500)
    Checkpointer(model, tmp_path).save("model_0000004", iteration=4)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    messages = FORK.SimpleQueue()
    assert finish(start(fills_the_disk, tmp_path, 100_000, messages)) == 0
    message = messages.get()
    assert "model_0000009.pth: cannot be written" in message
    assert "--resume, from" in message
    assert "model_0000004.pth" in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

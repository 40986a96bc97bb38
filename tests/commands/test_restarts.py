"""Jobs that torchrun or a scheduler starts again end as if nothing had happened."""

import importlib
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed_runs import final_state, finish, quick_evaluation, start
from shape_runs import INSTANT, ROOT, assert_same

from cascade_det.commands import train
from cascade_det.config import load_config
from cascade_det.engine.restarts import continues, record_job
from cascade_det.engine.step import TrainingStep

RUN = ["--host", "standalone", "--config-file", INSTANT]
# A worker that dies in its first two lives: number 1, and then the main one.
MORTAL = """
import os, signal, sys
from cascade_det.commands.train import main
from cascade_det.engine.step import TrainingStep

life, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
run = TrainingStep.run


def mortal(self, batch, iteration, **rest):
    if (life, rank, iteration) in {("0", "1", 3), ("1", "0", 5)}:
        os.kill(os.getpid(), signal.SIGKILL)
    return run(self, batch, iteration, **rest)


TrainingStep.run = mortal
sys.exit(main())
"""


@pytest.fixture
def keys(shape_options):
    options = ["SOLVER.MAX_ITER", "8", "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", "2"]
    return [*shape_options, *options, "SEED", "1"]


def torchrun(script, *arguments, restarts=3):
    job = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *job, script, *RUN, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_workers_killed_under_torchrun_cost_nothing(keys, tmp_path):
    keys += ["DATASETS.TEST", "()", "OUTPUT_DIR"]
    (tmp_path / "mortal.py").write_text(MORTAL)
    done = torchrun(str(tmp_path / "mortal.py"), *keys, str(tmp_path / "cut"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Training from iteration 2 to 8" in done.stdout
    assert "Training from iteration 4 to 8" in done.stdout
    assert train.main([*RUN, "--num-gpus", "2", *keys, str(tmp_path / "whole")]) == 0
    cut, whole = (load_config(tmp_path / name / "config.yaml") for name in ("cut", "whole"))
    assert_same(final_state(cut), final_state(whole))


@pytest.fixture
def quick(monkeypatch):
    module = importlib.import_module("cascade_det.standalone.train")
    monkeypatch.setattr(module, "evaluate_all", quick_evaluation)


def command(words, before_step, before_save):
    """The command in a process of its own, with something done before its steps and its saves."""
    step, save = TrainingStep.run, torch.save

    def run(self, batch, iteration, **rest):
        before_step(iteration)
        return step(self, batch, iteration, **rest)

    def saving(data, path):
        before_save(path)
        save(data, path)

    TrainingStep.run, torch.save = run, saving
    sys.exit(train.main(words))


def nothing(_):
    pass


def warned_by_slurm(iteration):
    """``scontrol requeue`` after ``--signal=USR1@60``: the job ends by itself."""
    if iteration == 1:
        os.kill(os.getpid(), signal.SIGUSR1)


evicted = []


def evicted_by_kubernetes(iteration):
    if iteration == 4:
        evicted.append(iteration)
        os.kill(os.getpid(), signal.SIGTERM)


def grace_ends(path):
    """The grace period is over while the interrupted run saves."""
    if evicted:
        Path(path).write_bytes(b"half of a checkpoint")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("quick")
def test_a_job_that_schedulers_start_again_and_again(keys, tmp_path):
    words = [*RUN, "--auto-resume", *keys, "OUTPUT_DIR", str(tmp_path / "cut")]
    lives = [
        (warned_by_slurm, nothing, 130),
        (evicted_by_kubernetes, grace_ends, -signal.SIGKILL),
        (nothing, nothing, 0),
        (nothing, nothing, 0),  # once more, after it was complete
    ]
    statuses = [finish(start(command, words, *life[:2])) for life in lives]
    assert statuses == [status for *_, status in lives]
    log = (tmp_path / "cut" / "log.txt").read_text()
    starts = [
        line.split("Training from ")[1] for line in log.splitlines() if "Training from" in line
    ]
    assert starts == [f"iteration {n} to 8" for n in (0, 3, 4)]
    assert log.count("This training is complete") == 1
    whole = [*RUN, *keys, "OUTPUT_DIR", str(tmp_path / "whole")]
    assert finish(start(command, whole, nothing, nothing)) == 0
    cut, whole = (load_config(tmp_path / name / "config.yaml") for name in ("cut", "whole"))
    assert_same(final_state(cut), final_state(whole))


@pytest.fixture
def job(monkeypatch):
    """``job(restarts, id)``: this process is a worker of torchrun."""

    def place(restarts, name="none"):
        values = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "::1"}
        values |= {"MASTER_PORT": 1, "TORCHELASTIC_RUN_ID": name}
        values["TORCHELASTIC_RESTART_COUNT"] = restarts
        for key, value in values.items():
            monkeypatch.setenv(key, str(value))

    return place


def test_what_goes_on_without_being_told(tmp_path, job, monkeypatch):
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    assert continues(tmp_path, auto=True)
    assert not continues(tmp_path, auto=False)
    job(restarts=1)
    assert not continues(tmp_path, auto=False)  # the run of another torchrun
    job(restarts=0)
    record_job(tmp_path)
    assert not continues(tmp_path, auto=False)
    job(restarts=2)
    assert continues(tmp_path, auto=False)
    job(restarts=2, name="another")
    assert not continues(tmp_path, auto=False)
    job(restarts=2)
    monkeypatch.setattr("os.getppid", lambda: 1)  # a later torchrun
    assert not continues(tmp_path, auto=False)


def test_nothing_to_go_on_with_is_a_start(tmp_path, job, caplog):
    caplog.set_level(logging.INFO)
    assert not continues(tmp_path / "new", auto=True)
    assert "no checkpoint in" in caplog.text
    job(restarts=1)
    record_job(tmp_path)
    assert not continues(tmp_path, auto=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--resume", "--auto-resume"], "not allowed with"),
        (["--eval-only", "--auto-resume"], "--auto-resume is for a training"),
    ],
)
def test_options_that_exclude_each_other(options, words, capsys):
    with pytest.raises(SystemExit):
        train.main([*RUN, *options])
    assert words in capsys.readouterr().err

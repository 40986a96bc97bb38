"""A training whose terminal goes away: it saves and ends, or goes on where it was told to."""

import os
import pty
import re
import sys
import time
from pathlib import Path

import pytest

from make_shapes import make_dataset

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "quick_schedules" / "instant_test.yaml"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def options(folder, max_iter):
    make_dataset(folder / "shapes", train=4, val=0, width=128, height=96, hard=0.0)
    dataset = ("shapes", str(folder / "shapes/train.json"), str(folder / "shapes/train"))
    return [
        *("CASCADE.DATASETS", str([dataset]), "DATASETS.TRAIN", "('shapes',)"),
        *("DATASETS.TEST", "()", "OUTPUT_DIR", str(folder / "run")),
        *("SOLVER.MAX_ITER", str(max_iter), "SOLVER.CHECKPOINT_PERIOD", "100000"),
        *("CASCADE.LOG_PERIOD", "1", "DATALOADER.NUM_WORKERS", "1"),
    ]


@pytest.mark.parametrize(
    ("before", "max_iter", "status", "last"),
    [([], 100_000, 130, r"model_\d{7}"), (["nohup"], 12, 0, "model_final")],
    ids=["hangup", "nohup"],
)
def test_the_terminal_goes_away(tmp_path, before, max_iter, status, last):
    tool = str(ROOT / "tools" / "train_net.py")
    run = [*before, sys.executable, tool, "--host", "standalone", "--config-file", str(CONFIG)]
    run += options(tmp_path, max_iter)
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execvpe(run[0], run, ENVIRONMENT)
    figures = tmp_path / "run" / "metrics.json"
    deadline = time.monotonic() + 100
    while not (figures.exists() and figures.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.close(terminal)  # The kernel sends SIGHUP, and whatever is written there fails from now on.
    _, ended = os.waitpid(child, 0)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert os.waitstatus_to_exitcode(ended) == status, log
    checkpoint = (tmp_path / "run" / "last_checkpoint").read_text()
    assert re.fullmatch(f"{last}.pth", checkpoint)
    assert (tmp_path / "run" / checkpoint).exists()
    assert "Traceback" not in log

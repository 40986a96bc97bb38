"""A training whose terminal goes away: it saves and ends, or goes on where it was told to."""

import os
import pty
import re
import signal
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "quick_schedules" / "instant_test.yaml"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("before", "max_iter", "status", "last"),
    [([], 100_000, 130, r"model_\d{7}"), (["nohup"], 12, 0, "model_final")],
    ids=["hangup", "nohup"],
)
def test_the_terminal_goes_away(tmp_path, shape_options, before, max_iter, status, last):
    run = [*before, sys.executable, "-m", "cascade_det", "train", "--host", "standalone"]
    run += ["--config-file", str(CONFIG), *shape_options, "DATASETS.TEST", "()"]
    run += ["OUTPUT_DIR", str(tmp_path / "run"), "SOLVER.MAX_ITER", str(max_iter)]
    run += ["SOLVER.CHECKPOINT_PERIOD", "100000", "CASCADE.LOG_PERIOD", "1"]
    run += ["DATALOADER.NUM_WORKERS", "1"]
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
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
    resuming = "To continue: python -m cascade_det train --resume --host standalone --config-file"
    assert (resuming in log) == (status != 0)

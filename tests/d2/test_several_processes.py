"""Runs in Detectron2 with several processes on the CPU, as a user types them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shape_runs import INSTANT, ROOT

pytest.importorskip("detectron2.engine", exc_type=ImportError)

import train_net
from cascade_det.d2 import host

pytestmark = pytest.mark.needs_detectron2

TOOL = ROOT / "tools" / "train_net.py"
RUN = ["--host", "detectron2", "--config-file", INSTANT]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def keys(options, tmp_path_factory):
    """Averaged weights, and detections of every score, that there is something to compare."""
    folder = tmp_path_factory.mktemp("several")
    more = ["CASCADE.EMA_DECAY", "0.5", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    return [*options, *more, "OUTPUT_DIR", str(folder / "output")]


@pytest.fixture(scope="module")
def trained(keys):
    """Begun under torchrun, gone on with by processes of the command's own."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    short = ["SOLVER.MAX_ITER", "2", "DATASETS.TEST", "()"]
    begun = subprocess.run(
        [sys.executable, *TORCHRUN, str(TOOL), *RUN, *keys, *short],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert begun.returncode == 0, begun.stdout + begun.stderr
    more = ["SOLVER.MAX_ITER", "3", "TEST.EVAL_PERIOD", "0"]
    assert train_net.main([*RUN, "--num-gpus", "2", "--resume", *keys, *more]) == 0
    return Path(keys[-1]), begun


def test_two_processes_write_one_run(trained):
    folder, begun = trained
    log = (folder / "log.txt").read_text()
    assert log.splitlines()[0].endswith("Host: detectron2, as --host says")
    assert log.count("Host: detectron2") == begun.stdout.count("Host: detectron2") + 1 == 2
    assert begun.stdout.count("Training from iteration 0 to 2") == 1
    assert "Training from iteration 2 to 3" in (folder / "log.txt.rank1").read_text()
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "total_loss" in line] == [0, 1, 2]
    final = torch.load(folder / "model_final.pth", weights_only=True)
    assert final["iteration"] == 2
    assert final.keys() == {"model", "training_weights", "run", "trainer", "iteration"}


def test_figures_are_those_of_one_process(trained, keys, tmp_path):
    folder, _ = trained
    options = [*keys, "OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", str(folder / "model_final.pth")]
    results = host.evaluate(host.load_config(RUN[-1], options))
    together = json.loads((folder / "results.json").read_text())
    alone = json.loads((tmp_path / "results.json").read_text())
    assert results["stages"]["regions"] > 0
    assert together["exits"]["images"] == 3
    for name in ("bbox", "stages", "exits", "analysis"):
        assert json.dumps(together[name]) == json.dumps(alone[name])


def test_a_mistake_is_told_once(keys, tmp_path, capfd):
    """One that only the processes find."""
    arguments = [*RUN, "--num-gpus", "2", *keys, "MODEL.ROI_HEADS.NUM_CLASSES", "4"]
    assert train_net.main([*arguments, "OUTPUT_DIR", str(tmp_path)]) == 1
    told = "".join(capfd.readouterr())
    assert told.count("MODEL.ROI_HEADS.NUM_CLASSES is 4") == 1
    assert "Traceback" not in told

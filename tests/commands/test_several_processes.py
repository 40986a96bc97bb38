"""The command with several processes, as a user types it; signals and files that fail, too."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cascade_det.commands import train
from cascade_det.config import load_config
from cascade_det.parallel.interrupts import Interrupted

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "train_net.py"
CONFIG = ROOT / "configs" / "quick_schedules" / "instant_test.yaml"
RUN = ["--host", "standalone", "--config-file", str(CONFIG)]
PATHS = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), "OMP_NUM_THREADS": "1"}
HOSTS = ("standalone", pytest.param("detectron2", marks=pytest.mark.needs_detectron2))


def command(*arguments):
    return [str(word) for word in (sys.executable, TOOL, *RUN, *arguments)]


def run(*arguments):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def keys(shape_options, tmp_path_factory):
    """Made for one process with one image; two processes take half the iterations."""
    options = [*shape_options, "OUTPUT_DIR", str(tmp_path_factory.mktemp("several"))]
    options += ["SOLVER.IMS_PER_BATCH", "1", "SOLVER.REFERENCE_WORLD_SIZE", "1"]
    options += ["SOLVER.CHECKPOINT_PERIOD", "100", "CASCADE.OPTIMIZER", "SGD"]
    return [*options, "CASCADE.LOG_PERIOD", "1", "CASCADE.EMA_DECAY", "0.5"]


@pytest.fixture(scope="module", params=HOSTS)
def host(request):
    if request.param == "detectron2":
        pytest.importorskip("detectron2.engine", exc_type=ImportError)
    return request.param


@pytest.fixture(scope="module")
def trained(host, keys, tmp_path_factory):
    """Begun under torchrun, gone on with by processes of the command's own."""
    folder = tmp_path_factory.mktemp(host)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "cascade_det", "train", *RUN, "--host", host]
    keys = [*keys, "OUTPUT_DIR", folder]
    begun = run(*torchrun, *command, *keys, "SOLVER.MAX_ITER", 4, "DATASETS.TEST", "()")
    options = ["SOLVER.MAX_ITER", 6, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    resumed = run(*command, "--num-gpus", 2, "--resume", *keys, *options)
    return folder, begun, resumed


def test_two_processes_write_one_run(trained):
    folder, begun, resumed = trained
    files = sorted(file.name for file in folder.glob("*.pth"))
    assert files == ["model_best.pth", "model_final.pth"]
    final = torch.load(folder / "model_final.pth", weights_only=True)
    assert final.keys() == {"model", "training_weights", "run", "trainer", "iteration"}
    assert final["iteration"] == 2
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "total_loss" in line] == [0, 1, 2]
    assert "Training from iteration 0 to 2" in begun.stdout
    assert "Training from iteration 2 to 3" in resumed.stdout


def test_the_configuration_is_scaled(trained):
    folder, _, _ = trained
    cfg = load_config(folder / "config.yaml")
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER) == (2, 3)
    assert load_config(CONFIG).SOLVER.BASE_LR * 2 == cfg.SOLVER.BASE_LR


def test_each_process_has_a_log_and_one_the_console(trained, host):
    folder, begun, resumed = trained
    assert f"Host: {host}, as --host says" in (folder / "log.txt").read_text().splitlines()[0]
    for done in (begun, resumed):
        assert done.stdout.count("Host: ") == 1
        assert done.stdout.count("Training from iteration") == 1
        assert done.stdout.count("Saving checkpoint to") == 2  # one at the start
    for name in ("log.txt", "log.txt.rank1"):
        assert (folder / name).read_text().count("Training from iteration") == 2


@pytest.mark.usefixtures("own_catalog")
def test_figures_are_those_of_one_process(trained, host, keys, tmp_path):
    folder, _, _ = trained
    options = [*keys, "OUTPUT_DIR", str(tmp_path), "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    options += ["MODEL.WEIGHTS", str(folder / "model_final.pth")]
    assert train.main([*RUN, "--host", host, "--eval-only", *options]) == 0
    together, alone = (
        json.loads((path / "results.json").read_text()) for path in (folder, tmp_path)
    )
    assert alone["stages"]["regions"] > 0
    for name in ("bbox", "stages", "exits", "analysis"):
        assert json.dumps(together[name]) == json.dumps(alone[name])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-gpus", "2"], ["SOLVER.IMS_PER_BATCH is 1", "multiple of 2"]),
        (["--num-gpus", "0"], ["--num-gpus is 0"]),
        (["--num-machines", "2"], ["--dist-url", "auto"]),
        (["--num-machines", "2", "--machine-rank", "2"], ["--machine-rank is 2"]),
    ],
)
def test_mistakes_are_told_before_anything_starts(keys, tmp_path, capfd, arguments, words):
    options = [*keys, "SOLVER.REFERENCE_WORLD_SIZE", "0", "OUTPUT_DIR", str(tmp_path)]
    options += ["SOLVER.IMS_PER_BATCH", "1" if arguments == ["--num-gpus", "2"] else "2"]
    assert train.main([*RUN, *arguments, *options]) == 1
    output = "".join(capfd.readouterr())
    assert all(word in output for word in words)
    assert "Traceback" not in output


@pytest.mark.parametrize("host", [HOSTS[1]], indirect=True)
def test_a_mistake_that_only_the_processes_find_is_told_once(host, keys, tmp_path, capfd):
    options = [*keys, "MODEL.ROI_HEADS.NUM_CLASSES", "4", "SOLVER.IMS_PER_BATCH", "2"]
    command = [*RUN, "--host", host, "--num-gpus", "2"]
    assert train.main([*command, *options, "OUTPUT_DIR", str(tmp_path)]) == 1
    told = "".join(capfd.readouterr())
    assert told.count("MODEL.ROI_HEADS.NUM_CLASSES is 4") == 1
    assert "Traceback" not in told


def test_sigterm_to_all_processes_costs_nothing(keys, tmp_path):
    """As clusters send it: to the process that trains and its workers at once."""
    options = [*keys, "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 100_000, "DATASETS.TEST", "()"]
    options += ["DATALOADER.NUM_WORKERS", 2, "SOLVER.CHECKPOINT_PERIOD", 100_000]
    training = subprocess.Popen(
        command(*options),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    figures = tmp_path / "metrics.json"
    deadline = time.monotonic() + 100
    while not (figures.exists() and figures.read_text().count("\n") > 2):
        assert time.monotonic() < deadline
        assert training.poll() is None
        time.sleep(0.05)
    os.killpg(training.pid, signal.SIGTERM)
    output, _ = training.communicate(timeout=100)
    assert training.returncode == 130, output
    last = int(re.search(r"Interrupted after iteration (\d+)", output)[1])
    assert (tmp_path / "last_checkpoint").read_text() == f"model_{last:07d}.pth"
    assert (tmp_path / f"model_{last:07d}.pth").exists()
    assert f"python {TOOL} --resume --host standalone --config-file" in output
    assert "Traceback" not in output


def test_under_torchrun_the_command_to_go_on_is_torchruns(keys, tmp_path, capfd, monkeypatch):
    def interrupted(cfg, resume):
        raise Interrupted("Interrupted after iteration 3")

    monkeypatch.setattr("cascade_det.standalone.host.train", interrupted)
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "::1", "MASTER_PORT": 1}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    assert train.main([*RUN, *keys, "OUTPUT_DIR", str(tmp_path)]) == 130
    assert "the same torchrun command with --resume" in "".join(capfd.readouterr())


@pytest.mark.parametrize("where", ["file", "file/below", "locked"])
def test_a_folder_that_cannot_be_written_to(keys, tmp_path, capfd, where):
    (tmp_path / "file").touch()
    (tmp_path / "locked" / "log.txt").mkdir(parents=True)
    output = ["OUTPUT_DIR", str(tmp_path / where)]
    assert train.main([*RUN, *keys, *output]) == 1
    told = "".join(capfd.readouterr())
    assert f"OUTPUT_DIR is '{tmp_path / where}'" in told
    assert re.search("File exists|Not a directory|Is a directory", told)
    assert "Traceback" not in told


def test_a_file_that_cannot_be_written_is_told_in_a_line(keys, tmp_path):
    """As on a full disk: no file may become larger than 5 kB."""
    done = subprocess.run(
        command(*keys, "OUTPUT_DIR", tmp_path),
        env=ENVIRONMENT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    errors = [line for line in done.stdout.splitlines() if "ERROR" in line]
    assert len(errors) == 1
    assert f"{tmp_path / 'config.yaml'}: File too large" in errors[0]
    assert "Traceback" not in done.stdout

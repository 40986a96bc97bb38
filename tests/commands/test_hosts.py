"""Which host runs, and what is said of it: with Detectron2, without it, and with half of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cascade_det.commands import train

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "quick_schedules" / "instant_test.yaml"
# Ends early: after the host was chosen, since there is no such file.
KEYS = ["--config-file", str(CONFIG), "DATASETS.TRAIN", "('gone',)", "OUTPUT_DIR"]


def run_where(modules, *arguments):
    """The command in a process of its own, with a folder of modules before all others."""
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "train_net.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{modules}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.fixture
def broken(tmp_path):
    """``broken(source)``: a folder with a package ``detectron2`` that is that source."""

    def make(source):
        package = tmp_path / "modules" / "detectron2"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(source)
        return tmp_path / "modules"

    return make


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import detectron2._C", "No module named 'detectron2._C'"),
        ("import PIL.Image\nPIL.Image.NONE_SUCH", "has no attribute 'NONE_SUCH'"),
    ],
)
def test_without_a_whole_detectron2(broken, tmp_path, source, cause):
    folder = broken(source)
    done = run_where(folder, "--host", "detectron2", *KEYS, tmp_path / "asked")
    told = done.stdout + done.stderr
    assert done.returncode == 1
    assert "--host detectron2: Detectron2 cannot be imported" in told
    assert cause in told
    assert "--host standalone" in told
    assert "Traceback" not in told
    assert not (tmp_path / "asked").exists()


def test_auto_without_a_whole_detectron2(broken, tmp_path):
    folder = broken("import detectron2._C")
    done = run_where(folder, *KEYS, tmp_path / "output")
    assert done.returncode == 1
    first = (tmp_path / "output" / "log.txt").read_text().splitlines()[0]
    assert first in done.stdout.splitlines()[0]
    assert "Host: standalone, since Detectron2 cannot be imported (ModuleNotFoundError" in first
    assert "there is no data set 'gone'" in done.stdout


def test_the_host_that_is_asked_for(tmp_path, capfd):
    assert train.main(["--host", "standalone", *KEYS, str(tmp_path)]) == 1
    told = capfd.readouterr().out.splitlines()
    assert told[0].endswith("Host: standalone, as --host says")
    assert (tmp_path / "log.txt").read_text().splitlines()[0] == told[0]
    with pytest.raises(SystemExit):
        train.main(["--host", "mmdetection", *KEYS, str(tmp_path)])


@pytest.mark.needs_detectron2
@pytest.mark.parametrize(
    ("arguments", "why"),
    [(["--host", "detectron2"], "as --host says"), ([], "since it can be imported")],
)
def test_with_detectron2(tmp_path, capfd, arguments, why):
    pytest.importorskip("detectron2.engine", exc_type=ImportError)
    assert train.main([*arguments, *KEYS, str(tmp_path)]) == 1
    told = capfd.readouterr().out.splitlines()
    assert told[0].endswith(f"Host: detectron2, {why}")
    assert (tmp_path / "log.txt").read_text().splitlines()[0] == told[0]
    assert "there is no data set 'gone'" in told[-1]

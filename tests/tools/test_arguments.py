"""Help and errors in arguments come before anything that takes long to import."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = [
    path.relative_to(ROOT).as_posix()
    for folder in ("tools", "datasets")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "\nif __name__ ==" in path.read_text()
]
HEAVY = {"torch", "torchvision", "fvcore", "numpy", "scipy", "cv2", "matplotlib", "pycocotools"}


def run(*arguments: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """A run of Python, and the packages that it imported."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    modules = re.findall(r"^import time: .*\| +(\S+)$", result.stderr, re.MULTILINE)
    return result, {module.partition(".")[0] for module in modules}


def test_the_commands_are_found():
    assert {"tools/train_net.py", "datasets/make_shapes.py"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command):
    result, imported = run(command, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: {Path(command).name}")
    assert "argparse" in imported
    assert not imported & HEAVY


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tools/train_net.py", "--resume"], "--config-file"),
        (["tools/train_net.py", "--config-file", "a.yaml", "--host", "neither"], "'neither'"),
        (["tools/calibrate_exits.py", "--config-file", "a.yaml", "--output", "b"], "--max-ap-drop"),
        (["tools/visualize_data.py", "--num", "0"], "'0': give a whole number of 1 or more"),
        (["datasets/prepare_coco.py", "--splits", "test"], "'test'"),
    ],
)
def test_a_wrong_argument_is_told_before_anything_heavy_is_imported(arguments, words):
    result, imported = run(*arguments)
    assert result.returncode == 2
    assert words in result.stderr.rpartition("error: ")[2]
    assert not imported & HEAVY


def test_the_configuration_loads_without_torch():
    result, imported = run("-c", "import cascade_det, cascade_det.config, cascade_det.hosts")
    assert result.returncode == 0, result.stderr
    assert "fvcore" in imported
    assert not imported & (HEAVY - {"fvcore"})


def test_what_is_imported_is_seen():
    """As the tests above take it for granted."""
    assert "numpy" in run("-c", "import numpy.linalg")[1]

"""Arguments of the console command and of the scripts; help and errors import nothing heavy."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cascade_det import __version__
from cascade_det.commands.arguments import check_output_file, real, whole
from cascade_det.commands.main import COMMANDS, main
from cascade_det.errors import CascadeDetError

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "tools/train_net.py": "train",
    "tools/predict.py": "predict",
    "tools/calibrate_exits.py": "calibrate",
    "tools/export.py": "export",
    "tools/benchmark.py": "benchmark",
    "tools/check_dataset.py": "check-data",
    "tools/visualize_data.py": "show-data",
    "tools/print_config.py": "print-config",
    "tools/evaluate_json.py": "eval-json",
    "datasets/prepare_coco.py": "prepare-coco",
}
CALIBRATE = ["-m", "cascade_det", "calibrate", "--config-file", "a", "--output", "b"]
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


def test_every_script_and_command_is_tested():
    assert {*SCRIPTS.values(), "eval", "convert", "report", "serve"} == COMMANDS.keys()
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tools").glob("*.py")}
    assert found == {script for script in SCRIPTS if script.startswith("tools")}


@pytest.mark.parametrize("script", [*SCRIPTS, "datasets/make_shapes.py"])
def test_help_imports_nothing_heavy(script, capsys):
    result, imported = run(script, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: {Path(script).name}")
    assert "argparse" in imported
    assert not imported & HEAVY
    if command := SCRIPTS.get(script):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        own = capsys.readouterr().out
        assert own.startswith(f"usage: cascade-det {command} ")
        assert own.partition("\n\n")[2] == result.stdout.partition("\n\n")[2]


def test_the_package_lists_its_commands():
    result, imported = run("-m", "cascade_det", "--help")
    assert result.stdout.startswith("usage: python -m cascade_det ")
    _, _, listed = result.stdout.partition("commands:\n")
    assert [line.split()[0] for line in listed.splitlines()] == list(COMMANDS)
    assert all(len(line.split()) > 2 for line in listed.splitlines())
    assert not imported & HEAVY
    result, _ = run("-m", "cascade_det", "--version")
    assert result.stdout == f"{__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tools/train_net.py", "--resume"], "--config-file"),
        (["-m", "cascade_det", "train", "--config-file", "a", "--host", "neither"], "'neither'"),
        (CALIBRATE, "--risk"),
        ([*CALIBRATE, "--exit-rate", "1", "--risk", "1"], "--risk: not allowed with argument"),
        (["-m", "cascade_det", "show-data", "--num", "0"], "'0': give a whole number of 1 or"),
        (["datasets/prepare_coco.py", "--splits", "test"], "'test'"),
        (["-m", "cascade_det", "convert", "a.json", "--to", "kitti", "--output", "b"], "'kitti'"),
        (["-m", "cascade_det", "serve", "--config-file", "a", "--port", "70000"], "'70000'"),
        (["-m", "cascade_det", "tran"], "'tran'"),
        (["-m", "cascade_det"], "COMMAND"),
    ],
)
def test_a_wrong_argument_is_told_before_anything_heavy_is_imported(arguments, words):
    result, imported = run(*arguments)
    assert result.returncode == 2
    assert words in result.stderr.rpartition("error: ")[2]
    assert not imported & HEAVY


def test_the_configuration_loads_without_torch():
    program = "import cascade_det.config, cascade_det.hosts, cascade_det.model_zoo"
    result, imported = run("-c", program)
    assert result.returncode == 0, result.stderr
    assert "fvcore" in imported
    assert not imported & (HEAVY - {"fvcore"})


def test_what_is_imported_is_seen():
    """As the tests above take it for granted."""
    assert "numpy" in run("-c", "import numpy.linalg")[1]


# Of every command that takes keys: what it needs beside them, a list that could swallow them last.
WITH_KEYS = {
    "benchmark": ["--batch", "1", "4"],
    "calibrate": ["--config-file", "a.yaml", "--risk", "0.1", "--output", "o"],
    "check_data": ["--config-file", "a.yaml"],
    "export": ["--config-file", "a.yaml", "--output", "o"],
    "predict": ["--config-file", "a.yaml", "--output", "o", "--input", "a.jpg", "b.jpg"],
    "print_config": ["--config-file", "a.yaml"],
    "serve": ["--config-file", "a.yaml"],
    "train": ["--config-file", "a.yaml"],
    "show_data": ["--config-file", "a.yaml", "--output", "o"],
}
KEYS = ["SOLVER.BASE_LR", "-1", "SEED", "5"]


def parse(command, arguments):
    return importlib.import_module(f"cascade_det.commands.{command}")._parse(arguments, None)


def test_all_commands_that_take_keys_are_known():
    modules = {command.module for command in COMMANDS.values()}
    assert modules - {"convert", "eval_json", "prepare_coco", "report"} == WITH_KEYS.keys()


@pytest.mark.parametrize("command", WITH_KEYS)
def test_keys_are_taken_with_and_without_opts_before_them(command):
    needed = WITH_KEYS[command]
    for before in (["--opts"], ["--"]):
        args = parse(command, [*needed, *before, *KEYS])
        assert args.opts == KEYS
    assert vars(args)[{"benchmark": "batches"}.get(command, "config_file")]
    single = needed[:-3] if command == "benchmark" else needed
    if command == "predict":
        single = ["--input", "a.jpg", *needed[:4]]
    assert parse(command, [*single, *KEYS]).opts == KEYS
    assert parse(command, [*single, *KEYS[:2], "--opts", *KEYS[2:]]).opts == KEYS
    assert parse(command, needed).opts == []


@pytest.mark.parametrize("before", [[], ["--opts"]])
@pytest.mark.parametrize("command", WITH_KEYS)
def test_options_behind_the_keys_are_told(command, before, capsys):
    with pytest.raises(SystemExit):
        parse(command, [*before, *KEYS, *WITH_KEYS[command]])
    option = WITH_KEYS[command][0]
    assert f"option {option} comes after keys: give options first" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(command, [*WITH_KEYS[command], *before, "--hasty", "1", *KEYS])
    assert re.search(r"option --hasty is unknown|arguments: --hasty", capsys.readouterr().err)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-1", "1e400", "-1e-9", "many", ""])
@pytest.mark.parametrize(
    ("command", "option", "needed"),
    [
        ("predict", "--score-threshold", WITH_KEYS["predict"]),
        ("eval_json", "--score-threshold", ["--json", "a", "--predictions", "b"]),
        ("show_data", "--num", WITH_KEYS["show_data"]),
        ("benchmark", "--seconds", []),
        ("benchmark", "--seed", []),
        ("benchmark", "--threads", []),
    ],
)
def test_numbers_are_finite_and_in_range(capsys, command, option, needed, text):
    with pytest.raises(SystemExit):
        parse(command, [*needed, f"{option}={text}"])
    assert f"{option}: " in capsys.readouterr().err


def test_ranges_include_their_ends():
    assert [real(0, 1)(text) for text in ("0", "1", "1e-3")] == [0.0, 1.0, 0.001]
    assert [whole(1, 9)(text) for text in ("1", "9")] == [1, 9]
    for kind in (real(0, 1), whole(0, 1)):
        with pytest.raises(Exception, match="from 0 to 1"):
            kind("2")


def test_a_command_writes_onto_nothing_that_it_reads(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "link").symlink_to("a")
    check_output_file(tmp_path / "b", [tmp_path / "a", None, "", tmp_path / "gone"])
    check_output_file(tmp_path / "a", [None, tmp_path / "gone"])
    for output in ("a", "link", "../" + tmp_path.name + "/a"):
        with pytest.raises(CascadeDetError, match=f"{output}: would replace .*/a"):
            check_output_file(tmp_path / output, [None, tmp_path / "a"])
    with pytest.raises(CascadeDetError, match="is a folder"):
        check_output_file(tmp_path, [])
    with pytest.raises(CascadeDetError, match="/dev/null: is not a regular file"):
        check_output_file(Path("/dev/null"), [])

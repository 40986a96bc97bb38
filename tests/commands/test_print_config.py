"""The resolved configuration, and whether each value stands where the command says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cascade_det.commands import print_config
from cascade_det.config import changed_keys, flat, get_cfg, load_config

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs" / "quick_schedules" / "demo.yaml"
EARLY_EXIT = ROOT / "configs" / "COCO-Detection" / "cascade_rcnn_R_50_FPN_1x_early_exit.yaml"


@pytest.fixture
def printed(capsys):
    def run(*arguments):
        status = print_config.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.mark.parametrize("flags", [[], ["--changed"]])
@pytest.mark.parametrize("file", [DEMO, EARLY_EXIT], ids=lambda file: file.stem)
def test_the_output_is_a_file_of_the_same_configuration(file, flags, printed, tmp_path):
    opts = ["SOLVER.CLIP_GRADIENTS.NORM_TYPE", "1e999", "OUTPUT_DIR", "a: #b 'c'"]
    status, out, _ = printed("--config-file", file, *flags, *opts)
    assert status == 0
    (tmp_path / "again.yaml").write_text(out)
    expected = load_config(file, opts)
    assert changed_keys(load_config(tmp_path / "again.yaml"), expected) == {}
    keys = changed_keys(get_cfg(), expected) if flags else flat(expected)
    assert out.count(" # ") == len(keys)


@pytest.mark.parametrize("file", [DEMO, EARLY_EXIT], ids=lambda file: file.stem)
def test_every_value_stands_in_the_line_that_is_named(file, printed):
    _, out, _ = printed("--config-file", file)
    found = re.findall(r"^ *(\w+): .* # ([^ ,]+):(\d+)", out, re.MULTILINE)
    assert len({source for _, source, _ in found}) > 1
    for name, source, line in found:
        assert "/../" not in source
        assert Path(source).read_text().splitlines()[int(line) - 1].strip().startswith(name)
    assert len(found) + out.count(" # default\n") == len(flat(get_cfg()))


def test_origins_by_hand(printed, tmp_path):
    base, top, last = (tmp_path / f"{name}.yaml" for name in ("base", "top", "last"))
    last.write_text("SOLVER:\n  MOMENTUM: 0.8\n")
    base.write_text("SOLVER:\n  BASE_LR: 0.1\n  GAMMA: 0.5\n  MOMENTUM: 0.9\n")
    top.write_text("_BASE_: base.yaml\n\nSOLVER: {BASE_LR: 0.2, STEPS: [1]}\n")
    options = ["SOLVER.GAMMA", "0.6", "SEED", "3", "SEED", "4"]
    status, out, err = printed("--config-file", top, "--config-file", last, "--changed", *options)
    assert status == 1
    assert "MODEL.BACKBONE.NAME" in err  # the checks across keys come after the values
    assert [re.sub(" +#", " #", line) for line in out.splitlines()] == [
        "SOLVER:",
        f"  BASE_LR: 0.2 # {top}:3, replaces 0.1 of {base}:2",
        f"  MOMENTUM: 0.8 # {last}:2, replaces 0.9 of {base}:4",
        f"  GAMMA: 0.6 # command line, replaces 0.5 of {base}:3",
        f"  STEPS: [1] # {top}:3, replaces the default [30000]",
        "SEED: 4 # command line, replaces 3 of command line",
    ]


def test_without_a_file_the_defaults(printed):
    status, out, err = printed()
    assert (status, err) == (0, "")
    assert out.count(" # default\n") == len(flat(get_cfg()))
    assert printed("--changed")[1] == "# Every value is the default.\n"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--config-file", "gone.yaml"], "gone.yaml"),
        (["--config-file", DEMO, "SOLVER.BASE_LRR", "1"], "SOLVER.BASE_LR?"),
        (["--config-file", DEMO, "SEED"], "KEY VALUE"),
        (["--config-file", DEMO, "SOLVER.MAX_ITER", "0"], "SOLVER.MAX_ITER is 0"),
    ],
)
def test_mistakes_end_with_status_1_and_a_message(arguments, word, printed):
    status, _, err = printed(*arguments)
    assert status == 1
    assert word in err
    assert "Traceback" not in err


def test_a_reader_that_goes_away_is_no_error():
    done = subprocess.run(
        f"'{sys.executable}' '{ROOT}/tools/print_config.py' | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.stdout.startswith("VERSION: 2")
    assert done.stderr == ""

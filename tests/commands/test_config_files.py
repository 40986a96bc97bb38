"""``--config-file`` given twice, in every command that has it: both are read, in their order."""

import re

import pytest

import calibrate_exits
import check_dataset
import predict
import print_config
import train_net
import visualize_data

COMMANDS = {
    "train_net": (train_net, ["--host", "standalone"]),
    "predict": (predict, ["--input", __file__, "--output", "nowhere"]),
    "print_config": (print_config, []),
    "check_dataset": (check_dataset, []),
    "visualize_data": (visualize_data, ["--output", "nowhere"]),
    "calibrate_exits": (calibrate_exits, ["--output", "nowhere", "--max-ap-drop", "0.1"]),
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """``files(*texts)``: options for these files; relative to where the command then runs."""

    def make(*texts):
        options = []
        for number, text in enumerate(texts):
            (tmp_path / f"{number}.yaml").write_text(text)
            options += ["--config-file", f"{number}.yaml"]
        return options

    monkeypatch.chdir(tmp_path)
    return make


@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_is_found_in_either_file(command, wrong, files, capfd):
    tool, options = COMMANDS[command]
    texts = ["SEED: 1\n", "SEED: 2\n"]
    texts[wrong] = "SEEED: 3\n"
    assert tool.main([*files(*texts), *options]) == 1
    assert f"{wrong}.yaml:1: there is no key SEEED" in "".join(capfd.readouterr())


@pytest.mark.parametrize("command", COMMANDS)
def test_the_later_file_wins(command, files, capfd):
    """Values out of range are told when everything is merged: only that of the last file."""
    tool, options = COMMANDS[command]
    given = files("SOLVER: {GAMMA: -1.0, MAX_ITER: -1}\n", "SOLVER: {GAMMA: -2.0}\n")
    assert tool.main([*given, *options]) == 1
    told = "".join(capfd.readouterr())
    assert "SOLVER.GAMMA is -2.0" in told
    assert "SOLVER.MAX_ITER is -1" in told
    assert "SOLVER.GAMMA is -1.0" not in told


def test_the_origin_of_each_value(files, capsys):
    given = files("SEED: 1\nVIS_PERIOD: 5\n", "# on top\nSEED: 2\n")
    print_config.main([*given, "--changed", "VIS_PERIOD", "6"])
    assert [re.sub(" +#", " #", line) for line in capsys.readouterr().out.splitlines()] == [
        "SEED: 2 # 1.yaml:2, replaces 1 of 0.yaml:1",
        "VIS_PERIOD: 6 # command line, replaces 5 of 0.yaml:2",
    ]

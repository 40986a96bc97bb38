"""``--config-file`` given twice, in every command that has it: both are read, in their order."""

import pytest

from cascade_det.commands.main import main

# Beside --config-file, each needs:
COMMANDS = {
    "train": ["--host", "standalone"],
    "eval": ["--host", "standalone"],
    "predict": ["--input", __file__, "--output", "nowhere"],
    "print-config": [],
    "check-data": [],
    "show-data": ["--output", "nowhere"],
    "calibrate": ["--output", "nowhere", "--max-ap-drop", "0.1"],
    "export": ["--output", "nowhere"],
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
    texts = ["SEED: 1\n", "SEED: 2\n"]
    texts[wrong] = "SEEED: 3\n"
    assert main([command, *files(*texts), *COMMANDS[command]]) == 1
    assert f"{wrong}.yaml:1: there is no key SEEED" in "".join(capfd.readouterr())


@pytest.mark.parametrize("command", COMMANDS)
def test_the_later_file_wins(command, files, capfd):
    """Values out of range are told when everything is merged: only that of the last file."""
    given = files("SOLVER: {GAMMA: -1.0, MAX_ITER: -1}\n", "SOLVER: {GAMMA: -2.0}\n")
    assert main([command, *given, *COMMANDS[command]]) == 1
    told = "".join(capfd.readouterr())
    assert "SOLVER.GAMMA is -2.0" in told
    assert "SOLVER.MAX_ITER is -1" in told
    assert "SOLVER.GAMMA is -1.0" not in told

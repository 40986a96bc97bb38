"""Commands end with a message and a status where a user can mend what stopped them."""

import importlib

import pytest

from cascade_det.commands.errors import without_traceback
from cascade_det.commands.main import COMMANDS
from cascade_det.errors import ConfigError, DownloadError
from cascade_det.files import write_json


def ended(action, *args):
    """The status of a command that does this."""

    @without_traceback
    def main():
        action(*args)
        return 7

    return main()


def fail(error):
    raise error


def test_the_status_of_the_command_is_kept(capfd):
    assert ended(str) == 7
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("error", [ConfigError("SEED is odd"), DownloadError("SEED is odd")])
def test_user_errors_are_told(error, capfd):
    assert ended(fail, error) == 1
    assert capfd.readouterr().err == "SEED is odd\n"


def test_names_in_messages_are_escaped(tmp_path, capfd):
    assert ended(fail, ConfigError("\x1b[2J: gr\udcf6\udcdfe\nnext line")) == 1
    assert capfd.readouterr().err == "\\x1b[2J: gr\\udcf6\\udcdfe\nnext line\n"
    assert ended(write_json, {}, tmp_path / ("\x1b" * 300)) == 1
    assert "\x1b" not in capfd.readouterr().err


def test_every_command_but_train_ends_so():
    """Train logs its errors, see test_commands.py."""
    for module in {command.module for command in COMMANDS.values()} - {"train"}:
        main = importlib.import_module(f"cascade_det.commands.{module}").main
        assert main.__code__ is without_traceback(main).__code__, module


def test_ctrl_c(capfd):
    assert ended(fail, KeyboardInterrupt()) == 130
    assert capfd.readouterr().err == ""


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        ended(divmod, 1, 0)


def test_paths_and_what_is_wrong_with_them(tmp_path, capfd):
    file = tmp_path / "file"
    file.write_text("mine")
    (tmp_path / "folder").mkdir()
    for path, message in {
        file / "a.json": f"{file}: is not a folder",
        file / "b" / "a.json": f"{file / 'b'}: Not a directory",
        tmp_path / "folder": "Is a directory",
        tmp_path / ("x" * 300): "File name too long",
    }.items():
        assert ended(write_json, {}, path) == 1
        error = capfd.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert ended(fail, OSError("no more room")) == 1
    assert capfd.readouterr().err == "no more room\n"
    assert file.read_text() == "mine"

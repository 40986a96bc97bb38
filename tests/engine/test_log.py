"""Log lines, on the console and in the file."""

import logging

import pytest

from cascade_det.engine.log import setup_logging


@pytest.mark.parametrize(
    "name",
    ["gr\udcf6\udcdfe.png", "\x1b[2Jcell", "a\u202egnp.exe"],
    ids=["no UTF-8", "escape", "bidi"],
)
def test_names_of_files_and_classes_are_escaped(tmp_path, capfd, monkeypatch, name):
    # pytest's own handler would keep the line as it is, and cannot report it.
    monkeypatch.setattr(logging.getLogger("cascade_det"), "propagate", False)
    setup_logging(tmp_path)
    logging.getLogger("cascade_det.test").warning("| %s |\n| next row |", name)
    for text in (capfd.readouterr().out, (tmp_path / "log.txt").read_text(encoding="utf-8")):
        assert name.encode("unicode_escape").decode() in text
        assert text.splitlines()[1:] == ["| next row |"]
        assert text.replace("\n", "").isprintable()

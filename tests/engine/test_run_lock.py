"""One run at a time in a folder: the second is refused, and a killed first one does not block."""

import errno
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from cascade_det.config import get_cfg
from cascade_det.engine import run_lock
from cascade_det.engine.run_lock import alone_in_output_dir, check_free
from cascade_det.errors import ConfigError

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from cascade_det.config import get_cfg
from cascade_det.engine.run_lock import alone_in_output_dir
cfg = get_cfg()
cfg.OUTPUT_DIR = sys.argv[1]
@alone_in_output_dir
def run(cfg):
    print("here", flush=True)
    time.sleep(600)
run(cfg)
"""


@alone_in_output_dir
def run(cfg, inside=lambda: None):
    inside()
    return sorted(os.listdir(cfg.OUTPUT_DIR))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(run_lock, "_PATIENCE", 0.2)


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    return cfg


@contextmanager
def another(cfg):
    command = [sys.executable, "-c", HOLDER, cfg.OUTPUT_DIR]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "here\n"
        yield process
        process.kill()


def test_another_process_is_named_and_nothing_is_written(cfg):
    with another(cfg) as process:
        before = {p: p.stat().st_mtime_ns for p in Path(cfg.OUTPUT_DIR).iterdir()}
        for attempt in (lambda: run(cfg), lambda: check_free(cfg.OUTPUT_DIR)):
            with pytest.raises(ConfigError, match=f"in use.*process {process.pid} on ") as error:
                attempt()
            assert cfg.OUTPUT_DIR in str(error.value)
        assert {p: p.stat().st_mtime_ns for p in Path(cfg.OUTPUT_DIR).iterdir()} == before
        process.send_signal(signal.SIGKILL)
        process.wait()
        check_free(cfg.OUTPUT_DIR)
        run(cfg)


def test_after_an_error_and_an_end_the_folder_is_free(cfg):
    with pytest.raises(ZeroDivisionError):
        run(cfg, lambda: 1 // 0)
    run(cfg)
    check_free(cfg.OUTPUT_DIR)
    assert os.listdir(cfg.OUTPUT_DIR) == [".cascade_det.lock"]


def test_looking_at_a_folder_that_is_missing_makes_none(tmp_path):
    check_free(tmp_path / "missing")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "content",
    ["", "[]", "[1]", "3", "{}", '{"pid": 1}', "\ud800", '{"pid": {"a": 1}, "host": null}'],
)
def test_an_owner_that_says_nothing_useful(cfg, content):
    folder = Path(cfg.OUTPUT_DIR)
    folder.mkdir()
    (folder / ".cascade_det.owner.json").write_text(content, errors="surrogatepass")
    with (
        FileLock(folder / ".cascade_det.lock"),
        pytest.raises(ConfigError, match="is unknown"),
    ):
        check_free(folder)


def test_what_an_owner_says_does_not_reach_the_terminal_raw(cfg):
    folder = Path(cfg.OUTPUT_DIR)
    folder.mkdir()
    said = dict.fromkeys(("pid", "host", "since", "command"), "\x1b[2J" * 500)
    (folder / ".cascade_det.owner.json").write_text(json.dumps(said))
    with FileLock(folder / ".cascade_det.lock"), pytest.raises(ConfigError) as error:
        check_free(folder)
    assert "\x1b" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "error", [NotImplementedError("no flock"), OSError(errno.ENOLCK, "no flock")]
)
def test_a_file_system_without_locks_is_told_and_no_obstacle(cfg, monkeypatch, caplog, error):
    def refuse(self, **_):
        raise error

    monkeypatch.setattr(run_lock.FileLock, "acquire", refuse)
    assert run(cfg) == [".cascade_det.owner.json"]
    assert f"has no locks ({error})" in caplog.text


def test_another_error_is_not_taken_for_a_file_system_without_locks(cfg, monkeypatch):
    def refuse(self, **_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_lock.FileLock, "acquire", refuse)
    with pytest.raises(OSError, match="No space left"):
        run(cfg)

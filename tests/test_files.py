"""Files are whole or not there, whatever ends the writer."""

import os
import re
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cascade_det import files
from cascade_det.files import atomic_path, remove_leftovers, write_json

ROOT = Path(__file__).parents[1]
LEFTOVER = ".cascade_det-0123456789abcdef.tmp"
WRITER = """
import sys, time
from cascade_det.files import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print(temporary, flush=True)
    time.sleep(60)
"""


@contextmanager
def full_disk(size):
    """No file grows beyond ``size`` bytes, as on a disk that has no room for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def writer(tmp_path):
    """A process in the middle of writing ``tmp_path / "file"``, and its temporary file."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "file")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        yield process, Path(process.stdout.readline().strip())
        process.kill()


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(200_000)),
        lambda path: torch.save(torch.zeros(100_000), path),
    ],
    ids=["bytes", "torch.save"],
)
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, write):
    path = tmp_path / "model.pth"
    path.write_text("old")
    with pytest.raises((OSError, RuntimeError)), full_disk(100_000), atomic_path(path) as temporary:
        write(temporary)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["model.pth"]


def test_the_old_file_is_there_while_the_new_one_is_written_and_after_a_kill(tmp_path, writer):
    process, temporary = writer
    (tmp_path / "file").write_text("old")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "file").read_text() == "old"
    assert temporary.read_text() == "half"


def test_leftovers_of_a_killed_writer_go_and_those_of_a_live_one_stay(tmp_path, writer):
    process, temporary = writer
    remove_leftovers(tmp_path)
    assert temporary.read_text() == "half"
    process.send_signal(signal.SIGKILL)
    process.wait()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == []


def test_leftovers_of_a_process_that_is_gone_go(tmp_path):
    (tmp_path / LEFTOVER).write_text("half")
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == []


def test_what_this_process_writes_stays(tmp_path):
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("new")
        remove_leftovers(tmp_path)
    assert (tmp_path / "a").read_text() == "new"


def test_other_files_stay(tmp_path):
    names = [".draft.2024.tmp", LEFTOVER[1:], f"{LEFTOVER}.gz", ".cascade_det-1.tmp", "a.tmp"]
    for name in names:
        (tmp_path / name).write_text("x")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / LEFTOVER).write_text("x")
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "below"])
    assert (tmp_path / "below" / LEFTOVER).exists()
    remove_leftovers(tmp_path / "missing")


def test_bytes_and_name_are_on_the_disk_before_the_block_ends(tmp_path, monkeypatch):
    """The order of what a crash of the machine must not undo: bytes, name, folder."""
    steps = []

    def fsync(descriptor):
        steps.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def replace(source, target, replace=os.replace):
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", replace)
    write_json({}, tmp_path / "a.json")
    assert [re.sub("[0-9a-f]{16}", "#", step) for step in steps] == [
        ".cascade_det-#.tmp",
        "rename",
        tmp_path.name,
    ]


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("not supported")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    (tmp_path / LEFTOVER).write_text("somebody's")
    remove_leftovers(tmp_path)
    assert (tmp_path / LEFTOVER).exists()
    write_json([1], tmp_path / "a")
    assert (tmp_path / "a").read_text() == "[1]\n"


def test_file_systems_that_cannot_sync_a_folder(tmp_path, monkeypatch):
    def refuse_folders(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError("invalid argument")

    monkeypatch.setattr(files.os, "fsync", refuse_folders)
    write_json([1], tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]

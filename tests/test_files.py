"""Files are whole or not there, whatever ends the writer."""

import csv
import math
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
from cascade_det.errors import CascadeDetError
from cascade_det.files import (
    atomic_folder,
    atomic_path,
    remove_leftovers,
    write_csv,
    write_json,
)

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


def test_a_killed_writer_leaves_the_old_file_and_a_leftover_to_remove(tmp_path, writer):
    process, temporary = writer
    (tmp_path / "file").write_text("old")
    remove_leftovers(tmp_path)
    assert temporary.read_text() == "half"  # it is still being written
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "file").read_text() == "old"
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


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


def test_a_fifo_a_folder_and_a_link_of_such_names_are_left_alone(tmp_path):
    names = [f".cascade_det-{digit * 16}.tmp" for digit in "abc"]
    os.mkfifo(tmp_path / names[0])
    (tmp_path / "mine").write_text("mine")
    (tmp_path / names[1]).symlink_to("mine")
    (tmp_path / names[2]).symlink_to(tmp_path)
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "mine"])


def test_an_error_names_the_file_and_nothing_else(tmp_path):
    with pytest.raises(OSError, match="Is a directory") as caught:
        write_json([1], tmp_path)
    assert str(caught.value).endswith(f": '{tmp_path}'")


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "-rf", ".hidden"])
def test_any_name_that_fits_can_be_written(tmp_path, name):
    write_json([1], tmp_path / name)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("old", [None, 0o600, 0o640, 0o444, 0o755])
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_mode_of_a_file_stays_and_a_new_one_has_that_of_the_umask(tmp_path, old, mask):
    path = tmp_path / "file"
    before = os.umask(mask)
    try:
        if old is not None:
            path.write_text("old")
            path.chmod(old)
        with atomic_path(path) as temporary:
            # Nobody may read it sooner than the file that it becomes.
            assert not temporary.stat().st_mode & 0o777 & ~(old or 0o666) & 0o077
            temporary.write_text("new")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == (0o666 & ~mask if old is None else old)


@pytest.mark.parametrize("mode", [0o000, 0o200])
def test_a_file_that_its_owner_cannot_read_is_replaced(tmp_path, monkeypatch, mode):
    """A user other than root could not open it to wait for the disk."""
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)
    opened, real_open = [], os.open

    def look(name, *arguments, **options):
        opened.append(os.path.exists(name) and os.stat(name).st_mode & 0o400)
        return real_open(name, *arguments, **options)

    with atomic_path(path) as temporary:
        temporary.write_text("new")
        monkeypatch.setattr(files.os, "open", look)
    assert opened
    assert all(opened)
    assert path.stat().st_mode & 0o777 == mode
    path.chmod(0o600)
    assert path.read_text() == "new"


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "file").symlink_to("theirs")
    write_json([1], tmp_path / "file")
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "theirs").read_text() == "theirs"


def test_a_name_that_is_taken_is_not_written_through(tmp_path, monkeypatch):
    """Such as a link planted in a shared cache."""
    tokens = iter(["a" * 16, "b" * 16])
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / f".cascade_det-{'a' * 16}.tmp").symlink_to("theirs")
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: next(tokens))
    with pytest.raises(FileExistsError):
        write_json([1], tmp_path / "file")
    assert (tmp_path / "theirs").read_text() == "theirs"


RACER = """
import sys
from cascade_det.files import atomic_path
for _ in range(300):
    with atomic_path(sys.argv[1]) as temporary, temporary.open("w") as file:
        for _ in range(20):
            file.write(sys.argv[2] * 50)
            file.flush()
"""


def test_two_writers_never_show_half_a_file(tmp_path):
    path = tmp_path / "file"
    writers = [
        subprocess.Popen([sys.executable, "-c", RACER, path, letter], cwd=ROOT) for letter in "ab"
    ]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            seen.add(path.read_text())
            remove_leftovers(tmp_path)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen <= {"a" * 1000, "b" * 1000}
    assert os.listdir(tmp_path) == ["file"]


class TestFolders:
    MADE = ("a", "b")

    def write(self, path, text="new", fail=None):
        with atomic_folder(path, made=self.MADE) as folder:
            (folder / "a").write_text(text)
            if fail is not None:
                raise fail

    def test_it_replaces_the_old_one_as_a_whole(self, tmp_path):
        path = tmp_path / "out"
        self.write(path, "old")
        (path / "b").write_text("of the old one alone")
        path.chmod(0o700)
        self.write(path)
        assert {p.name: p.read_text() for p in path.iterdir()} == {"a": "new"}
        assert path.stat().st_mode & 0o777 == 0o700
        assert os.listdir(tmp_path) == ["out"]

    @pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt()])
    def test_after_an_error_the_old_one_is_there(self, tmp_path, error):
        self.write(tmp_path / "out", "old")
        for path in (tmp_path / "out", tmp_path / "other"):
            with pytest.raises(type(error)):
                self.write(path, fail=error)
        assert os.listdir(tmp_path) == ["out"]
        assert (tmp_path / "out" / "a").read_text() == "old"

    def test_what_others_put_there_is_not_replaced(self, tmp_path):
        self.write(tmp_path / "out", "old")
        (tmp_path / "out" / "notes.txt").write_text("mine")
        with pytest.raises(CascadeDetError, match=r"out: holds notes\.txt"):
            self.write(tmp_path / "out", fail=AssertionError("it is told before the work"))
        assert sorted(os.listdir(tmp_path / "out")) == ["a", "notes.txt"]

    def test_what_is_put_there_meanwhile_is_not_replaced(self, tmp_path):
        self.write(tmp_path / "out", "old")
        with (
            pytest.raises(CascadeDetError, match="holds notes"),
            atomic_folder(tmp_path / "out", made=self.MADE),
        ):
            (tmp_path / "out" / "notes").touch()
        assert (tmp_path / "out" / "a").read_text() == "old"

    def test_a_file_in_its_place(self, tmp_path):
        (tmp_path / "out").write_text("mine")
        with pytest.raises(CascadeDetError, match="is not a folder"):
            self.write(tmp_path / "out")
        assert (tmp_path / "out").read_text() == "mine"

    def test_a_link_keeps_leading_there(self, tmp_path):
        (tmp_path / "disk").mkdir()
        (tmp_path / "out").symlink_to("disk")
        self.write(tmp_path / "out")
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "disk" / "a").read_text() == "new"

    def test_systems_that_cannot_exchange_names(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "_exchange_at_once", lambda *_: False)
        self.test_it_replaces_the_old_one_as_a_whole(tmp_path)

    def test_leftovers_of_a_killed_writer_go_with_all_that_is_in_them(self, tmp_path):
        program = WRITER.replace("atomic_path(sys.argv[1])", "atomic_folder(sys.argv[1], made=())")
        program = program.replace("import atomic_path", "import atomic_folder")
        program = program.replace("temporary.write_text", "(temporary / 'a').write_text")
        command = [sys.executable, "-c", program, str(tmp_path / "out")]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            temporary = Path(process.stdout.readline().strip())
            remove_leftovers(tmp_path)
            assert (temporary / "a").read_text() == "half"
            process.kill()
        remove_leftovers(tmp_path)
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_cell_is_a_formula(tmp_path, name):
    write_csv(tmp_path / "t.csv", [name], [[name, -1.5, -2]])
    with (tmp_path / "t.csv").open(newline="") as file:
        headers, cells = csv.reader(file)
    assert headers[0] == cells[0]
    assert cells[0].startswith("'")
    assert cells[1:] == ["-1.5", "-2"]


def test_cells_of_names_that_are_no_text(tmp_path):
    write_csv(tmp_path / "t.csv", ["a"], [["gr\udcf6\udcdfe.png"], ["two\nlines"], [math.nan]])
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file))[1:] == [[r"gr\udcf6\udcdfe.png"], [r"two\x0alines"], [""]]


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
    (tmp_path / LEFTOVER).write_text("another's")
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

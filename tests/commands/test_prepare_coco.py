"""COCO is complete after prepare_coco, whatever came between; nothing lands outside its folder."""

import dataclasses
import hashlib
import io
import json
import os
import re
import resource
import shutil
import stat
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_det.commands import prepare_coco
from cascade_det.commands.prepare_coco import main, unpack
from cascade_det.data.catalog import find_dataset
from cascade_det.errors import CascadeDetError, DatasetError
from tests.reference.web_server import Fault, serving

COUNTS = {"train": 5, "val": 3}


def zipped(files, compression=zipfile.ZIP_DEFLATED):
    """A zip file of names and bytes."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def pixels(split, i):
    return f"{split} {i} ".encode() * 100


def instances(split, count=None):
    names = [f"{i:012d}.jpg" for i in range(count or COUNTS[split])]
    return json.dumps({"images": [{"file_name": name} for name in names]}).encode()


ARCHIVES = {
    "annotations/annotations_trainval2017.zip": {
        "annotations/instances_train2017.json": instances("train"),
        "annotations/captions_train2017.json": b"{}",
        "annotations/instances_val2017.json": instances("val"),
    },
    **{
        f"zips/{split}2017.zip": {
            f"{split}2017/": b"",
            **{f"{split}2017/{i:012d}.jpg": pixels(split, i) for i in range(count)},
        }
        for split, count in COUNTS.items()
    },
}


@pytest.fixture
def web(monkeypatch):
    """A mirror of a small COCO, and its figures in place of the real ones."""
    monkeypatch.setenv("no_proxy", "*")
    archives = {}
    with serving() as server:
        for path, files in ARCHIVES.items():
            content = server.files[f"/coco/{path}"] = zipped(files)
            digest = hashlib.sha256(content).hexdigest()
            size = sum(map(len, files.values()))
            archives[path] = prepare_coco.Archive(path, len(content), digest, size)
        annotations, *images = archives.values()
        monkeypatch.setattr(prepare_coco, "ANNOTATIONS", annotations)
        monkeypatch.setattr(prepare_coco, "IMAGES", dict(zip(COUNTS, images, strict=True)))
        monkeypatch.setattr(prepare_coco, "COUNTS", COUNTS)
        yield server


def run(web, output, *arguments):
    return main(["--output", str(output), "--base-url", web.address("/coco/"), *arguments])


def prepare(web, output, *arguments):
    assert run(web, output, *arguments) == 0


@pytest.fixture
def refusal(web, tmp_path, capsys):
    """What the command says when it refuses."""

    def say(output=tmp_path):
        assert run(web, output, "--splits", "val") == 1
        return capsys.readouterr().err

    return say


def files_in(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != "coco"  # the archives, and their locks
    }


def expected(*splits):
    wanted = {}
    for split in splits:
        name = f"annotations/instances_{split}2017.json"
        wanted[name] = instances(split)
        for i in range(COUNTS[split]):
            wanted[f"{split}2017/{i:012d}.jpg"] = pixels(split, i)
    return wanted


@pytest.mark.parametrize("splits", [["val"], ["train"], ["val", "train"], []])
def test_the_layout_is_what_the_catalog_expects(web, tmp_path, monkeypatch, capsys, splits):
    prepare(web, tmp_path, *(["--splits", *splits] if splits else []))
    splits = splits or ["val", "train"]
    assert files_in(tmp_path / "coco") == expected(*splits)
    folders = {"annotations", *(f"{split}2017" for split in splits)}
    assert set(os.listdir(tmp_path / "coco")) == folders
    assert "complete" in capsys.readouterr().out
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for split in splits:
        source = find_dataset(f"coco_2017_{split}")
        assert Path(source.json_file).is_file()
        assert len(os.listdir(source.image_root)) == COUNTS[split]


def test_the_default_folder(web, tmp_path, monkeypatch):
    for variable in (True, False):
        folder = tmp_path / str(variable)
        folder.mkdir()
        monkeypatch.chdir(folder)
        if variable:
            monkeypatch.setenv("DETECTRON2_DATASETS", "elsewhere")
        else:
            monkeypatch.delenv("DETECTRON2_DATASETS")
        main(["--splits", "val", "--base-url", web.address("/coco")])
        assert [path.name for path in folder.iterdir()] == ["elsewhere" if variable else "datasets"]


def test_what_is_there_is_not_fetched_again(web, tmp_path):
    prepare(web, tmp_path, "--splits", "val")
    web.requests.clear()
    prepare(web, tmp_path, "--splits", "val")
    assert web.requests == []
    prepare(web, tmp_path)
    wanted = ["/coco/annotations/annotations_trainval2017.zip", "/coco/zips/train2017.zip"]
    assert [path for path, _ in web.requests] == wanted
    assert files_in(tmp_path / "coco") == expected("val", "train")


def test_a_broken_transfer_goes_on(web, tmp_path, monkeypatch, refusal):
    monkeypatch.setattr("cascade_det.weights.downloads.time.sleep", lambda _: None)
    web.faults = [Fault(), Fault(cut=200), Fault(status=404)]
    assert "val2017.zip: the server answers 404" in refusal()
    web.requests.clear()
    prepare(web, tmp_path, "--splits", "val")
    assert files_in(tmp_path / "coco") == expected("val")
    assert web.ranges == ["bytes=200-"]


@pytest.mark.parametrize("damage", ["missing", "shorter", "other bytes", "a link"])
def test_a_half_unpacked_folder_is_completed(web, tmp_path, damage):
    prepare(web, tmp_path, "--splits", "val", "--keep-archives")
    first = tmp_path / "coco/val2017/000000000000.jpg"
    second = tmp_path / "coco/val2017/000000000001.jpg"
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    second.unlink()  # the folder is not complete
    before = (tmp_path / "coco/val2017/000000000002.jpg").stat().st_mtime_ns
    if damage == "shorter":
        first.write_bytes(b"")
    elif damage == "other bytes":
        first.write_bytes(first.read_bytes()[::-1])
    elif damage == "a link":
        first.unlink()
        first.symlink_to(outside)
    web.requests.clear()
    prepare(web, tmp_path, "--splits", "val")
    assert files_in(tmp_path / "coco") == expected("val")
    assert (tmp_path / "coco/val2017/000000000002.jpg").stat().st_mtime_ns == before
    assert outside.read_bytes() == b"mine"
    assert web.requests == []  # the archive was kept


def test_no_name_that_somebody_else_could_have_prepared_is_written_through(tmp_path, monkeypatch):
    """Neither a link in the place of the file nor one in the place of a temporary file."""
    name = f"a/{'x' * 251}.jpg"  # as long as a name may be
    (tmp_path / "a.zip").write_bytes(zipped({name: b"pixels"}))
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    folder = tmp_path / "a"
    folder.mkdir()
    left, others = folder / f".cascade_det-{'0' * 16}.tmp", folder / ".a.jpg.1.tmp"
    left.write_bytes(b"of a killed run")
    others.symlink_to(outside)
    (tmp_path / name).symlink_to(outside)
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("waits for the disk at every file"))
    unpack(tmp_path / "a.zip", tmp_path, ".*", limit=100)
    assert outside.read_bytes() == b"mine"
    assert sorted(path.name for path in folder.iterdir()) == [".a.jpg.1.tmp", f"{'x' * 251}.jpg"]
    assert (tmp_path / name).read_bytes() == b"pixels"


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped({"a/1.jpg": b"small", "a/2.jpg": bytes(50_000)}))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(DatasetError, match=r"a\.zip: cannot be unpacked into .*File too large"):
            unpack(tmp_path / "a.zip", tmp_path, ".*", limit=60_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path / "a") == ["1.jpg"]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"no zip file", "not a complete zip file"),
        (zipped(ARCHIVES["zips/val2017.zip"])[:-30], "not a complete zip file"),
        (zipped({"val2017/000000000000.jpg": b"x"}), "lacks 2 images, 000000000001.jpg"),
    ],
)
def test_an_archive_brought_by_hand_is_checked(
    web, tmp_path, monkeypatch, refusal, content, wanted
):
    path = tmp_path / "coco/val2017.zip"
    path.parent.mkdir()
    path.write_bytes(content)
    assert f"{path}: its SHA-256 is" in refusal()
    right = dataclasses.replace(
        prepare_coco.IMAGES["val"], sha256=hashlib.sha256(content).hexdigest()
    )
    monkeypatch.setitem(prepare_coco.IMAGES, "val", right)
    assert wanted in refusal()


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (instances("val", 2), "has 2 images, and COCO's has 3"),
        (b"{", "cannot be read"),
        (b"[]", "cannot be read"),
        (b'{"images": [{}]}', "cannot be read"),
    ],
)
def test_other_annotations_are_named(tmp_path, refusal, content, wanted):
    path = tmp_path / "coco/annotations/instances_val2017.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert f"instances_val2017.json: {wanted}" in refusal()


def test_an_output_that_cannot_be_made(tmp_path, refusal):
    (tmp_path / "file").write_text("")
    message = refusal(tmp_path / "file")
    assert "file/coco" in message
    assert "Not a directory" in message
    assert message.count("\n") == 1


def test_ctrl_c_says_how_to_go_on(web, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_coco, "unpack", interrupted)
    assert run(web, tmp_path, "--splits", "val") == 130
    assert "Run the same command again to continue" in capsys.readouterr().err


def test_room_is_needed_for_archives_and_files(web, tmp_path, monkeypatch, refusal):
    needed = sum(
        archive.size + archive.unpacked
        for archive in (prepare_coco.ANNOTATIONS, prepare_coco.IMAGES["val"])
    )
    for free in (needed - 1, needed):
        usage = shutil._ntuple_diskusage(needed, 0, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        if free < needed:
            message = refusal(tmp_path / "new" / "folder")
            assert re.search("GB are needed.*GB are free.*--output", message)
            assert web.requests == []
            assert list(tmp_path.iterdir()) == []
    prepare(web, tmp_path / "new" / "folder", "--splits", "val")
    # Half unpacked, and the archive here: only the rest of the files is needed.
    prepare(web, tmp_path, "--splits", "val", "--keep-archives")
    (tmp_path / "coco/val2017/000000000001.jpg").unlink()
    usage = shutil._ntuple_diskusage(needed, 0, len(pixels("val", 1)))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    prepare(web, tmp_path, "--splits", "val")


def test_figures_of_the_real_archives():
    archives = [prepare_coco.ANNOTATIONS, *prepare_coco.IMAGES.values()]
    assert [len(bytes.fromhex(archive.sha256)) for archive in archives] == [32] * 3
    assert prepare_coco.IMAGES.keys() == prepare_coco.COUNTS.keys()


def link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    "name",
    ["/tmp/x.jpg", "../x.jpg", "a/../../x.jpg", "..\\x.jpg", "C:\\x.jpg", link("a/x.jpg")],
    ids=str,
)
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    path = tmp_path / "evil.zip"
    path.write_bytes(zipped({"a/good.jpg": b"1", name: b"/etc/passwd"}))
    with pytest.raises(DatasetError, match=r"evil\.zip: refused"):
        unpack(path, tmp_path / "folder", ".*", limit=100)
    assert os.listdir(tmp_path) == ["evil.zip"]


def test_bombs_are_refused(tmp_path):
    path = tmp_path / "bomb.zip"
    path.write_bytes(zipped({f"a/{i}.jpg": bytes(1_000_000) for i in range(3)}))
    assert path.stat().st_size < 10_000
    with pytest.raises(DatasetError, match=r"bomb\.zip: would unpack to 3,000,000 bytes"):
        unpack(path, tmp_path / "folder", ".*", limit=2_999_999)
    assert os.listdir(tmp_path) == ["bomb.zip"]


def test_bombs_that_lie_about_their_size_are_cut(tmp_path):
    content = zipped({"a/0.jpg": bytes(1_000_000)})
    true, claimed = (1_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little")
    assert content.count(true) == 2
    path = tmp_path / "bomb.zip"
    path.write_bytes(content.replace(true, claimed))
    with pytest.raises(DatasetError, match=r"bomb\.zip: is not a complete zip file.*CRC"):
        unpack(path, tmp_path / "folder", ".*", limit=100)
    assert files_in(tmp_path / "folder") == {}


def test_a_wrong_checksum_leaves_no_file(tmp_path):
    content = zipped({"a/0.jpg": b"precious pixels"}, zipfile.ZIP_STORED)
    path = tmp_path / "damaged.zip"
    path.write_bytes(content.replace(b"precious", b"worthless"[:8]))
    with pytest.raises(DatasetError, match=r"damaged\.zip.*CRC"):
        unpack(path, tmp_path / "folder", ".*", limit=100)
    assert files_in(tmp_path / "folder") == {}


@settings(max_examples=60)
@given(position=st.floats(0, 1, exclude_max=True), replacement=st.binary(max_size=4))
def test_a_damaged_archive_gives_its_files_or_an_error(tmp_path_factory, position, replacement):
    folder = tmp_path_factory.mktemp("any")
    files = {"a/0.jpg": b"abc" * 50, "a/1.jpg": b"defg" * 30}
    content = zipped(files)
    start = int(position * len(content))
    content = content[:start] + replacement + content[start + len(replacement) :]
    (folder / "x.zip").write_bytes(content)
    try:
        unpack(folder / "x.zip", folder / "out", r"a/\d\.jpg", limit=1000)
    except CascadeDetError as error:
        assert "x.zip" in str(error)  # noqa: PT017 - some damage does not matter
    unpacked = files_in(folder / "out")
    assert all(unpacked[name] == files.get(name, unpacked[name]) for name in unpacked)
    assert {path.name for path in folder.iterdir()} <= {"x.zip", "out"}

"""Lists of images from every source."""

import json

import pytest

from cascade_det.errors import CascadeDetError, DatasetError
from cascade_det.offline.images import Entry, list_images

fsspec = pytest.importorskip("fsspec")


def listed(*inputs, root=None):
    return list_images([str(given) for given in inputs], root)


def paths(*inputs, root=None):
    return [entry.path for entry in listed(*inputs, root=root)]


def coco(*images, **others):
    return json.dumps({"images": [{"id": i, "file_name": n} for i, n in images], **others})


def names_of(folder):
    names = ("a.png", "b turned.jpg", "c broken.png", "d \N{SNOWMAN} ñ.png", "e again.png")
    return [str(folder / name) for name in names]


def test_files_folders_and_globs_are_listed_once_with_absolute_paths(photos, monkeypatch):
    monkeypatch.chdir(photos)
    assert paths(".") == names_of(photos)
    assert paths(f"file://{photos}") == names_of(photos)
    assert paths("*.png", ".", photos / "a.png", "a.png", "night") == [
        *(name for name in names_of(photos) if name.endswith(".png")),
        str(photos / "b turned.jpg"),
        str(photos / "night" / "a.png"),
    ]
    assert [entry.id for entry in listed("night", ".")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("given", ["nothing", "*.gif", "nothing.json", "nothing.parquet"])
def test_an_input_that_is_missing_or_empty_is_named(photos, monkeypatch, given):
    monkeypatch.chdir(photos)
    with pytest.raises(CascadeDetError, match=given.replace("*", r"\*")):
        listed("a.png", given)


def test_coco_json_gives_ids_and_names_below_its_folder_or_another(tmp_path):
    (tmp_path / "val.json").write_text(coco((7, "a.png"), (3, "day/a.png"), (9, "a.png")))
    here = str(tmp_path)
    assert listed(tmp_path / "val.json") == [
        Entry(7, f"{here}/a.png"),
        Entry(3, f"{here}/day/a.png"),
        Entry(9, f"{here}/a.png"),
    ]
    assert paths(tmp_path / "val.json", root="s3://bucket/x/") == [
        "s3://bucket/x/a.png",
        "s3://bucket/x/day/a.png",
        "s3://bucket/x/a.png",
    ]
    (tmp_path / "none.json").write_text(coco())
    assert listed(tmp_path / "none.json") == []


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x.png", "a/../../x.png", "http://host/x.png", "", 3, None]
)
def test_a_name_in_coco_json_does_not_leave_its_folder(tmp_path, name):
    (tmp_path / "val.json").write_text(coco((1, name)))
    with pytest.raises(DatasetError, match=r"val\.json"):
        listed(tmp_path / "val.json")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"images": 3}', '{"images": [3]}', '{"images": [{"id": 1}]}', "[" * 9999]
    + [coco((i, "a.png")) for i in (None, "1", 1.5, True, 2**63)],
)
def test_a_json_that_is_no_list_of_images_is_refused(tmp_path, content):
    (tmp_path / "val.json").write_text(content)
    with pytest.raises(DatasetError, match=r"val\.json"):
        listed(tmp_path / "val.json")


def test_ids_differ_and_all_images_have_one_or_none(tmp_path, photos):
    (tmp_path / "a.json").write_text(coco((1, "a.png"), (2, "b.png")))
    (tmp_path / "b.json").write_text(coco((2, "c.png")))
    with pytest.raises(DatasetError, match=r"id 2 is of .*b\.png.* and of .*c\.png"):
        listed(tmp_path / "a.json", tmp_path / "b.json")
    with pytest.raises(DatasetError, match="2 images have ids from a list, and 1 images"):
        listed(tmp_path / "a.json", photos / "a.png")


def test_parquet_gives_paths_ids_and_bytes(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "list.parquet"

    def write(rows_per_group=2, **columns):
        parquet.write_table(pa.table(columns), file, row_group_size=rows_per_group)

    write(path=["a.png", "/b.png", "memory://c.png", "a.png"], more=[1, 2, 3, 4])
    wanted = [f"{tmp_path}/a.png", "/b.png", "memory://c.png"]
    assert listed(file) == [Entry(i, path) for i, path in enumerate(wanted, start=1)]
    write(path=["a.png", "b.png"], id=[4, -2])
    assert listed(file, root="/x") == [Entry(4, "/x/a.png"), Entry(-2, "/x/b.png")]
    write(path=["same", "same", "same"], bytes=[b"x", b"y", None])
    packed = [(str(file), 0, 0), (str(file), 0, 1), (str(file), 1, 0)]
    assert [entry.packed for entry in listed(file)] == packed
    for columns in ({"name": ["a"]}, {"path": [None]}, {"path": [""]}, {"path": [1]}):
        write(**columns)
        with pytest.raises(DatasetError, match=r"list\.parquet.*path"):
            listed(file)
    for ids in (["1"], [None], [1.0]):
        write(path=["a"], id=ids)
        with pytest.raises(DatasetError, match=r"list\.parquet.* id"):
            listed(file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CascadeDetError, match=r"list\.parquet"):
        listed(file)


def test_addresses_are_listed_by_their_file_system():
    memory = fsspec.filesystem("memory")
    for name in ("x/b.png", "x/a.JPG", "x/notes.txt", "x/deep/c.png"):
        memory.pipe_file(f"/listed/{name}", b"")
    memory.pipe_file("/listed/val.json", coco((4, "x/b.png")).encode())
    there = "memory://listed"
    wanted = [f"memory:///listed/x/{name}" for name in ("a.JPG", "b.png")]
    assert paths(f"{there}/x") == paths(f"{there}/x/") == wanted
    assert paths(f"{there}/x/*.png", f"{there}/x/a.JPG") == [wanted[1], f"{there}/x/a.JPG"]
    assert listed(f"{there}/val.json") == [Entry(4, f"{there}/x/b.png")]
    assert paths("http://host/a?b=c.png") == ["http://host/a?b=c.png"]
    for missing in (f"{there}/y", f"{there}/y.png", "nothing-like-this://x/y"):
        with pytest.raises(CascadeDetError, match=missing):
            listed(missing)

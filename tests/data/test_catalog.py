"""Finding data sets by name."""

import pytest

from cascade_det.data.catalog import find_dataset
from cascade_det.errors import DatasetError

BUILTIN_NAMES = (
    [f"coco_2014_{split}" for split in ("train", "val", "minival", "valminusminival")]
    + [f"coco_2017_{split}" for split in ("train", "val", "test", "test-dev", "val_100")]
)  # fmt: skip


def make_set(folder, name="cells"):
    """An empty json and an empty image folder, as an entry of the config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text("{}")
    (folder / name).mkdir()
    return name, str(folder / f"{name}.json"), str(folder / name)


def test_own_dataset_is_found(tmp_path):
    entry = make_set(tmp_path)
    source = find_dataset("cells", [entry])
    assert (source.name, str(source.json_file), str(source.image_root)) == entry


def test_own_paths_start_from_the_working_directory(tmp_path, monkeypatch):
    make_set(tmp_path)
    monkeypatch.chdir(tmp_path)
    source = find_dataset("cells", [("cells", "cells.json", "cells")])
    assert source.json_file.resolve() == (tmp_path / "cells.json").resolve()


def test_tilde_is_the_home_folder(tmp_path, monkeypatch):
    make_set(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_dataset("cells", [("cells", "~/cells.json", "~/cells")]).image_root == (
        tmp_path / "cells"
    )
    make_builtin(tmp_path / "all")
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/all")
    assert find_dataset("coco_2017_val").image_root == tmp_path / "all/coco/val2017"


def make_builtin(root):
    (root / "coco/annotations").mkdir(parents=True)
    (root / "coco/annotations/instances_val2017.json").write_text("{}")
    (root / "coco/val2017").mkdir()


def test_builtin_root_is_the_folder_datasets_by_default(tmp_path, monkeypatch):
    make_builtin(tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    source = find_dataset("coco_2017_val")
    assert source.image_root.resolve() == (tmp_path / "datasets/coco/val2017").resolve()


@pytest.mark.parametrize(
    ("name", "json_name", "folder"),
    [
        ("coco_2014_minival", "instances_minival2014.json", "val2014"),
        ("coco_2017_train", "instances_train2017.json", "train2017"),
        ("coco_2017_test-dev", "image_info_test-dev2017.json", "test2017"),
        ("coco_2017_val_100", "instances_val2017_100.json", "val2017"),
    ],
)
def test_builtin_layout(tmp_path, monkeypatch, name, json_name, folder):
    (tmp_path / "coco/annotations").mkdir(parents=True)
    (tmp_path / "coco/annotations" / json_name).write_text("{}")
    (tmp_path / "coco" / folder).mkdir()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert find_dataset(name).name == name


@pytest.mark.needs_detectron2
@pytest.mark.parametrize("name", BUILTIN_NAMES)
def test_builtin_layout_is_detectron2s(name, tmp_path, monkeypatch):
    data = pytest.importorskip("detectron2.data")
    theirs = data.MetadataCatalog.get(name)
    theirs_root = "datasets/"  # registered at import, when the variable is not set
    if not theirs.json_file.startswith(theirs_root):
        pytest.skip("DETECTRON2_DATASETS was set when Detectron2 was imported")
    json_file = tmp_path / theirs.json_file.removeprefix(theirs_root)
    image_root = tmp_path / theirs.image_root.removeprefix(theirs_root)
    json_file.parent.mkdir(parents=True)
    json_file.write_text("{}")
    image_root.mkdir()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    source = find_dataset(name)
    assert (source.json_file, source.image_root) == (json_file, image_root)


def test_unknown_name_suggests_the_nearest(tmp_path):
    with pytest.raises(DatasetError, match=r"'cels'.*Did you mean 'cells'"):
        find_dataset("cels", [make_set(tmp_path)])
    with pytest.raises(DatasetError, match=r"Did you mean 'coco_2017_val'.*CASCADE\.DATASETS"):
        find_dataset("coco_2017_vall")


@pytest.mark.parametrize("missing", ["json", "images"])
def test_missing_file_of_an_own_dataset_names_the_key(tmp_path, missing):
    name, json_file, image_root = make_set(tmp_path)
    gone = str(tmp_path / "gone")
    entry = (name, gone, image_root) if missing == "json" else (name, json_file, gone)
    with pytest.raises(DatasetError, match=r"gone.*'cells' of CASCADE\.DATASETS"):
        find_dataset("cells", [entry])


def test_missing_builtin_names_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    with pytest.raises(DatasetError, match=r"instances_train2017\.json.*DETECTRON2_DATASETS"):
        find_dataset("coco_2017_train")


def test_one_name_for_two_datasets_is_an_error_that_shows_both(tmp_path):
    first, second = make_set(tmp_path / "a"), make_set(tmp_path / "b")
    with pytest.raises(DatasetError, match=r"a/cells\.json.*b/cells\.json|b/cells.*a/cells"):
        find_dataset("cells", [first, second])
    with pytest.raises(DatasetError, match="coco_2017_val"):
        find_dataset("cells", [first, ("coco_2017_val", *second[1:])])


def test_the_same_dataset_twice_is_no_error(tmp_path, monkeypatch):
    entry = make_set(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert find_dataset("cells", [entry, ("cells", "./cells.json", "cells")]).name == "cells"

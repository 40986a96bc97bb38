"""Data sets of a configuration in Detectron2's catalogs."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances

from cascade_det.d2.datasets import register_dataset
from cascade_det.errors import DatasetError

pytestmark = pytest.mark.needs_detectron2


@pytest.fixture
def entry(shapes):
    """An entry of ``CASCADE.DATASETS``."""
    return ("shapes_own", str(shapes / "train.json"), str(shapes / "train"))


def test_a_set_of_ones_own_is_registered_with_its_files(entry, shapes):
    source = register_dataset("shapes_own", [entry])
    assert (source.json_file, source.image_root) == (shapes / "train.json", shapes / "train")
    records = get_detection_dataset_dicts("shapes_own")
    content = json.loads((shapes / "train.json").read_text())
    assert [r["image_id"] for r in records] == [image["id"] for image in content["images"]]
    assert sum(len(r["annotations"]) for r in records) == len(content["annotations"])
    names = [category["name"] for category in content["categories"]]
    assert MetadataCatalog.get("shapes_own").thing_classes == names


def test_as_often_as_one_likes(entry):
    assert register_dataset("shapes_own", [entry]) == register_dataset("shapes_own", [entry])


def test_also_after_its_user_did_the_same(entry, shapes, monkeypatch):
    """However the paths are spelt."""
    monkeypatch.chdir(shapes.parent)
    register_coco_instances("shapes_own", {}, "shapes/../shapes/train.json", "shapes/train/")
    assert register_dataset("shapes_own", [entry]).json_file.samefile(entry[1])


def test_a_name_of_other_files_is_refused_and_both_are_shown(entry, shapes):
    register_coco_instances("shapes_own", {}, str(shapes / "val.json"), str(shapes / "val"))
    with pytest.raises(DatasetError) as error:
        register_dataset("shapes_own", [entry])
    for path in (shapes / "train.json", shapes / "train", shapes / "val.json", shapes / "val"):
        assert re.search(rf"{re.escape(str(path))}[ ,.]", str(error.value))
    assert MetadataCatalog.get("shapes_own").json_file == str(shapes / "val.json")


def test_a_set_that_its_user_registered_alone(shapes):
    register_coco_instances("shapes_own", {}, str(shapes / "val.json"), str(shapes / "val"))
    source = register_dataset("shapes_own", [])
    assert (source.name, source.json_file) == ("shapes_own", shapes / "val.json")


def test_a_registered_set_whose_files_are_gone(shapes):
    register_coco_instances("shapes_own", {}, str(shapes / "gone.json"), str(shapes / "val"))
    with pytest.raises(DatasetError, match=r"registered in Detectron2 as .*gone\.json.*missing"):
        register_dataset("shapes_own", [])


def test_a_registered_set_without_a_json(shapes):
    DatasetCatalog.register("shapes_own", list)
    with pytest.raises(DatasetError, match=r"'shapes_own' .* without a COCO-format json"):
        register_dataset("shapes_own", [])


def test_an_unknown_name_is_told_with_the_nearest(entry):
    with pytest.raises(DatasetError, match=r"no data set 'shape_own'\. Did you mean 'shapes_own'"):
        register_dataset("shape_own", [entry])
    assert "shape_own" not in DatasetCatalog.list()


def test_a_builtin_name_lies_where_detectron2_looks_for_it():
    """Its own registration, made from DETECTRON2_DATASETS when Detectron2 was imported."""
    if Path(MetadataCatalog.get("coco_2017_val").json_file).is_file():
        assert register_dataset("coco_2017_val", []).image_root.name == "val2017"
        return
    with pytest.raises(DatasetError, match=r"instances_val2017\.json.*DETECTRON2_DATASETS"):
        register_dataset("coco_2017_val", [])


def test_a_builtin_name_means_one_thing(entry):
    with pytest.raises(DatasetError, match=r"'coco_2017_val' means .*also .*val2017"):
        register_dataset("coco_2017_val", [("coco_2017_val", *entry[1:])])

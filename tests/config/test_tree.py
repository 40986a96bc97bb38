"""The tree of keys: Detectron2's own, our nodes inside its configuration, differences of two."""

from __future__ import annotations

from pathlib import Path

import pytest
from fvcore.common.config import CfgNode

from cascade_det.config import (
    add_cascade_config,
    changed_keys,
    flat,
    get_cfg,
    load_config,
    settings,
)

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(CONFIGS.rglob("*.yaml"))


def is_ours(key: str) -> bool:
    nodes = ("CASCADE", "CASCADE_DECODER", "DUAL_SCALE")
    nodes += ("EFFICIENTVIT", "HATNET", "HIERVIT", "PVTV2", "MAXVIT")
    return key.startswith(("CASCADE.", *(f"MODEL.{node}." for node in nodes)))


@pytest.fixture
def d2_cfg():
    return pytest.importorskip("detectron2.config").get_cfg()


def zoo_file(name: str) -> str:
    """A configuration of Detectron2's model zoo: installed with it, or beside its source."""
    package = Path(pytest.importorskip("detectron2").__file__).parent
    for folder in (package / "model_zoo" / "configs", package.parent / "configs"):
        if (folder / name).is_file():
            return str(folder / name)
    pytest.skip("Detectron2 is here without its configurations")


def test_every_key_and_value_of_detectron2_is_there_and_no_other(d2_cfg):
    ours = {key: value for key, value in flat(get_cfg()).items() if not is_ours(key)}
    theirs = flat(d2_cfg)
    assert ours == theirs
    # 800 == 800.0, and a tuple of the wrong kind would refuse values that Detectron2 takes.
    assert {key: type(value) for key, value in ours.items()} == {
        key: type(value) for key, value in theirs.items()
    }


def test_some_values_by_hand():
    values = flat(get_cfg())
    ours = [key for key in values if is_ours(key)]
    assert len(values) == 192 + len(ours)  # Detectron2's and ours
    assert values["VERSION"] == 2
    assert values["MODEL.ROI_BOX_CASCADE_HEAD.IOUS"] == (0.5, 0.6, 0.7)
    assert values["SOLVER.WARMUP_FACTOR"] == 0.001
    assert values["MODEL.CASCADE.ENSEMBLE"] == "mean_probs"
    assert values["MODEL.CASCADE.EXIT.ENABLED"] is False
    assert values["CASCADE.AMP_DTYPE"] == "auto"


def test_two_configurations_share_nothing():
    first = get_cfg()
    first.MODEL.PIXEL_MEAN[0] = 0.0
    first.MODEL.CASCADE.EXIT.ENABLED = True
    first.MODEL.ANCHOR_GENERATOR.SIZES[0].append(1024)
    second = get_cfg()
    assert second.MODEL.PIXEL_MEAN[0] == 103.53
    assert not second.MODEL.CASCADE.EXIT.ENABLED
    assert second.MODEL.ANCHOR_GENERATOR.SIZES == [[32, 64, 128, 256, 512]]


def test_adding_our_nodes_twice_changes_nothing():
    cfg = get_cfg()
    cfg.CASCADE.PATIENCE = 3
    before = cfg.clone()
    add_cascade_config(cfg)
    assert cfg == before


def test_adding_our_nodes_fills_the_gaps_and_keeps_the_rest():
    cfg = CfgNode({"MODEL": {"CASCADE": {"EXIT": {"ENABLED": True}}}, "CASCADE": {"PATIENCE": 4}})
    add_cascade_config(cfg)
    complete = get_cfg()
    complete.MODEL.CASCADE.EXIT.ENABLED = True
    complete.CASCADE.PATIENCE = 4
    assert cfg.MODEL.CASCADE == complete.MODEL.CASCADE
    assert cfg.CASCADE == complete.CASCADE


def test_our_nodes_have_the_type_of_the_configuration():
    class OtherNode(CfgNode):
        pass

    cfg = OtherNode({"MODEL": {}})
    add_cascade_config(cfg)
    nodes = (cfg.CASCADE, cfg.MODEL.CASCADE, cfg.MODEL.CASCADE.EXIT, cfg.MODEL.CASCADE.BOX_HEAD)
    assert {type(node) for node in nodes} == {OtherNode}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_detectron2_merges_the_same_files(d2_cfg, file):
    add_cascade_config(d2_cfg)
    d2_cfg.merge_from_file(str(file), allow_unsafe=False)
    assert flat(d2_cfg) == flat(load_config(file))


def test_what_detectron2_dumped_is_read_back(d2_cfg, write_yaml):
    d2_cfg.merge_from_file(zoo_file("Misc/cascade_mask_rcnn_R_50_FPN_3x.yaml"))
    dumped = write_yaml(d2_cfg.dump())
    loaded = flat(load_config(dumped))
    # YAML has no tuples, so what is nested in one comes back as lists, in both hosts.
    again = pytest.importorskip("detectron2.config").get_cfg()
    again.merge_from_file(str(dumped))
    assert {key: value for key, value in loaded.items() if not is_ours(key)} == flat(again)


def test_the_base_equals_detectron2s_cascade(d2_cfg, base_file):
    d2_cfg.merge_from_file(zoo_file("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"))
    theirs, ours = flat(d2_cfg), flat(load_config(base_file))
    different = {key for key, value in theirs.items() if ours[key] != value}
    assert different == {
        *("MODEL.MASK_ON", "MODEL.WEIGHTS", "MODEL.ROI_MASK_HEAD.NUM_CONV"),
        "MODEL.ROI_HEADS.NAME",
    }


@pytest.mark.parametrize("name", ["R_50_FPN_1x", "R_50_FPN_3x", "R_101_FPN_3x"])
def test_schedules_equal_detectron2s(d2_cfg, name):
    d2_cfg.merge_from_file(zoo_file(f"COCO-Detection/faster_rcnn_{name}.yaml"))
    file = CONFIGS / "COCO-Detection" / f"cascade_rcnn_{name}.yaml"
    theirs, ours = flat(d2_cfg), flat(load_config(file))
    assert {key for key, value in theirs.items() if ours[key] != value} == {
        "MODEL.ROI_HEADS.NAME",
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
        "MODEL.RPN.POST_NMS_TOPK_TRAIN",
        "MODEL.ROI_MASK_HEAD.NUM_CONV",
    }


def test_the_flat_table_has_every_value_under_its_full_key():
    cfg = CfgNode({"A": 1, "B": {"C": 2, "D": {"E": [3]}}})
    assert flat(cfg) == {"A": 1, "B.C": 2, "B.D.E": [3]}
    assert list(flat(cfg)) == ["A", "B.C", "B.D.E"]


def test_changed_keys_are_those_that_were_set(base_file):
    old = load_config(base_file)
    new = load_config(base_file, ["SOLVER.BASE_LR", "0.5", "SEED", "-1", "DATASETS.TEST", "('a',)"])
    assert changed_keys(old, new) == {
        "DATASETS.TEST": (("coco_2017_val",), ("a",)),
        "SOLVER.BASE_LR": (0.02, 0.5),
    }
    assert list(changed_keys(old, new)) == ["DATASETS.TEST", "SOLVER.BASE_LR"]
    assert changed_keys(old, old.clone()) == {}


def test_a_dumped_configuration_is_unchanged_although_its_tuples_are_lists(base_file, write_yaml):
    own = "(('a', 'a.json', 'a/'),)"
    cfg = load_config(base_file, ["CASCADE.DATASETS", own, "SOLVER.WEIGHT_DECAY_BIAS", "0.1"])
    again = load_config(write_yaml(cfg.dump()))
    assert again.CASCADE.DATASETS != cfg.CASCADE.DATASETS
    assert changed_keys(again, cfg) == {}


def test_a_key_that_only_one_has():
    one, other = CfgNode({"A": 1, "B": {"C": 2}}), CfgNode({"A": 1, "B": {"D": 3}})
    assert changed_keys(one, other) == {"B.D": (None, 3), "B.C": (2, None)}


def test_settings_are_the_keys_that_differ_from_the_defaults():
    cfg = get_cfg()
    assert settings(cfg) == {}
    cfg.SOLVER.BASE_LR, cfg.MODEL.RPN.IN_FEATURES = 0.5, ("p2",)
    cfg.DATASETS.TEST = []  # As the default, which is a tuple.
    cfg.OF_ANOTHER_PROJECT = 3
    default = get_cfg()
    assert settings(cfg) == {
        "SOLVER.BASE_LR": (default.SOLVER.BASE_LR, 0.5),
        "MODEL.RPN.IN_FEATURES": (default.MODEL.RPN.IN_FEATURES, ("p2",)),
    }

"""The flat table of keys, and what differs between two configurations."""

from __future__ import annotations

from fvcore.common.config import CfgNode

from cascade_det.config import changed_keys, flat, get_cfg, load_config


def test_the_flat_table_has_every_value_under_its_full_key(flatten):
    cfg = get_cfg()
    assert flat(cfg) == flatten(cfg)
    assert flat(cfg)["SOLVER.AMP.ENABLED"] is False


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

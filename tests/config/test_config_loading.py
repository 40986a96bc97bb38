"""Files and options: what is merged, in which order, and what is refused with which words."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_det.config import flat, get_cfg, load_config, merge_config
from cascade_det.config.shipped import config_path
from cascade_det.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


def error_of(config_file: str | Path | None = None, opts: tuple = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, opts)
    return str(caught.value)


# ---- what is merged


def test_no_file_and_no_options_are_the_defaults():
    assert load_config(None) == get_cfg()


def test_options_win_over_the_file_and_the_file_over_its_base(write_yaml):
    write_yaml("SOLVER: {BASE_LR: 0.1, GAMMA: 0.2, MOMENTUM: 0.3}\n", "base.yaml")
    file = write_yaml("_BASE_: base.yaml\nSOLVER: {GAMMA: 0.5, MOMENTUM: 0.6}\n")
    solver = load_config(file, ["SOLVER.MOMENTUM", "0.8"]).SOLVER
    assert (solver.BASE_LR, solver.GAMMA, solver.MOMENTUM) == (0.1, 0.5, 0.8)


def test_a_base_is_relative_to_the_file_that_names_it(write_yaml, tmp_path, monkeypatch):
    write_yaml("SEED: 1\nVIS_PERIOD: 1\nOUTPUT_DIR: a\n", "root.yaml")
    write_yaml("_BASE_: ../root.yaml\nSEED: 2\nVIS_PERIOD: 2\n", "middle/middle.yaml")
    file = write_yaml("_BASE_: ../middle/middle.yaml\nSEED: 3\n", "top/top.yaml")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    cfg = load_config(file)
    assert (cfg.SEED, cfg.VIS_PERIOD, cfg.OUTPUT_DIR) == (3, 2, "a")


def test_later_bases_of_a_list_win(write_yaml):
    write_yaml("SEED: 1\nVIS_PERIOD: 1\n", "first.yaml")
    write_yaml("SEED: 2\n", "second.yaml")
    cfg = load_config(write_yaml("_BASE_: [first.yaml, second.yaml]\nOUTPUT_DIR: out\n"))
    assert (cfg.SEED, cfg.VIS_PERIOD, cfg.OUTPUT_DIR) == (2, 1, "out")


def test_each_of_several_files_is_put_on_top_with_its_own_bases(write_yaml):
    write_yaml("SEED: 1\nVIS_PERIOD: 1\nOUTPUT_DIR: a\n", "one_base.yaml")
    first = write_yaml("_BASE_: one_base.yaml\nSEED: 2\nSOLVER: {GAMMA: 0.2}\n", "one.yaml")
    write_yaml("SEED: 3\nSOLVER: {MOMENTUM: 0.3}\n", "two_base.yaml")
    second = write_yaml("_BASE_: two_base.yaml\nVIS_PERIOD: 4\n", "two.yaml")
    cfg = get_cfg()
    history = merge_config(cfg, [first, str(second)], ["OUTPUT_DIR", "b"])
    assert (cfg.SEED, cfg.VIS_PERIOD, cfg.OUTPUT_DIR) == (3, 4, "b")
    assert (cfg.SOLVER.GAMMA, cfg.SOLVER.MOMENTUM) == (0.2, 0.3)
    sources = [setting.source for setting in history["SEED"]]
    assert [Path(source).name for source in sources] == [
        "default",
        "one_base.yaml:1",
        "one.yaml:2",
        "two_base.yaml:1",
    ]
    assert load_config([second, first]).SEED == 2
    assert load_config([]) == load_config(None)


def test_an_absolute_base_and_a_base_used_twice(write_yaml):
    root = write_yaml("SEED: 7\n", "root.yaml")
    write_yaml("_BASE_: root.yaml\n", "left.yaml")
    write_yaml("_BASE_: root.yaml\n", "right.yaml")
    cfg = load_config(write_yaml(f"_BASE_: [left.yaml, right.yaml, {root}]\n"))
    assert cfg.SEED == 7


def test_our_dump_is_read_back(base_file, write_yaml):
    cfg = load_config(base_file, ["CASCADE.DATASETS", "[['a', 'a.json', 'a/']]"])
    again = load_config(write_yaml(cfg.dump()))
    assert again.CASCADE.DATASETS == (["a", "a.json", "a/"],)
    # Tuples in tuples come back as lists; flat ones do not.
    key = "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS"
    before, after = flat(cfg), flat(again)
    assert tuple(map(tuple, after.pop(key))) == before.pop(key)
    assert after == before


def test_merge_config_changes_the_configuration_that_it_is_given(write_yaml):
    cfg = get_cfg()
    cfg.VIS_PERIOD = 9
    merge_config(cfg, write_yaml("SEED: 4\n"), ["OUTPUT_DIR", "x"])
    assert (cfg.VIS_PERIOD, cfg.SEED, cfg.OUTPUT_DIR) == (9, 4, "x")


# ---- types


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("SOLVER.BASE_LR", "1", 1.0),
        ("SOLVER.BASE_LR", "1e-3", 0.001),
        ("SOLVER.MAX_ITER", "90000", 90000),
        ("SOLVER.STEPS", "(1, 2)", (1, 2)),
        ("SOLVER.STEPS", "[]", ()),
        ("SOLVER.WEIGHT_DECAY_BIAS", "0", 0.0),
        ("SOLVER.WEIGHT_DECAY_BIAS", "None", None),
        ("SOLVER.AMP.ENABLED", "True", True),
        ("MODEL.PIXEL_STD", "(57, 57.1, 58)", [57, 57.1, 58]),
        ("MODEL.FPN.NORM", "", ""),
        ("MODEL.FPN.NORM", "''", ""),
        ("MODEL.FPN.NORM", "GN", "GN"),
        ("OUTPUT_DIR", "2024", "2024"),
        ("OUTPUT_DIR", "None", "None"),
        ("OUTPUT_DIR", "out/a b", "out/a b"),
        ("DATASETS.TRAIN", "('a',)", ("a",)),
    ],
)
def test_options_are_read_as_python_literals_of_the_wanted_type(key, text, value):
    read = flat(load_config(None, [key, text]))[key]
    assert read == value
    assert type(read) is type(value)


def test_an_int_in_a_file_where_a_float_is_wanted(write_yaml):
    cfg = load_config(write_yaml("SOLVER: {BASE_LR: 1, WEIGHT_DECAY_BIAS: 0}\n"))
    assert type(cfg.SOLVER.BASE_LR) is float
    assert type(cfg.SOLVER.WEIGHT_DECAY_BIAS) is float


def test_a_base_can_be_overridden_by_null_where_null_is_a_value(write_yaml):
    write_yaml("SOLVER: {WEIGHT_DECAY_BIAS: 0.5}\n", "base.yaml")
    cfg = load_config(write_yaml("_BASE_: base.yaml\nSOLVER: {WEIGHT_DECAY_BIAS: null}\n"))
    assert cfg.SOLVER.WEIGHT_DECAY_BIAS is None


def test_infinity_can_be_written_in_yaml(write_yaml):
    cfg = load_config(write_yaml("SOLVER: {CLIP_GRADIENTS: {NORM_TYPE: .inf}}\n"))
    assert math.isinf(cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE)


@pytest.mark.parametrize(
    ("key", "text", "actual", "wanted"),
    [
        ("SOLVER.MAX_ITER", "1.5", "float", "int"),
        ("SOLVER.MAX_ITER", "True", "bool", "int"),
        ("SOLVER.MAX_ITER", "many", "str", "int"),
        ("SOLVER.BASE_LR", "True", "bool", "float"),
        ("SOLVER.BASE_LR", "None", "NoneType", "float"),
        ("SOLVER.WEIGHT_DECAY_BIAS", "little", "str", "float or None"),
        ("SOLVER.AMP.ENABLED", "1", "int", "bool"),
        ("DATASETS.TRAIN", "coco_2017_train", "str", "list"),
        ("MODEL.ROI_BOX_CASCADE_HEAD.IOUS", "(0.5)", "float", "list"),
        ("MODEL.PIXEL_MEAN", "{'a': 1}", "dict", "list"),
    ],
)
def test_a_wrong_type_names_key_value_and_both_types(key, text, actual, wanted):
    message = error_of(None, (key, text))
    assert message.startswith("command line: ")
    assert key in message
    assert text.strip("()") in message
    assert f"of type {actual}," in message
    assert f" {wanted} is expected" in message


@pytest.mark.parametrize("text", ["a", "[a]", "(a,)", "('a')", "a,b", "", "1", "(1)"])
def test_lists_are_shown_as_they_can_be_written_anywhere(text, write_yaml):
    told = error_of(None, ("DATASETS.TRAIN", text))
    assert "Write ['a', 'b'] or [1, 2], and ['a'] or [1] for a single value." in told
    assert "double quotes" in told
    assert load_config(None, ["DATASETS.TRAIN", "['a', 'b']"]).DATASETS.TRAIN == ("a", "b")
    cfg = load_config(write_yaml("DATASETS: {TRAIN: ['a']}"), ["SOLVER.STEPS", "[1]"])
    assert (cfg.DATASETS.TRAIN, cfg.SOLVER.STEPS) == (("a",), (1,))


def test_what_a_comma_or_none_would_be(write_yaml):
    assert "A comma makes a list of it" in error_of(None, ("SOLVER.MAX_ITER", "90,000"))
    assert "a float or None is expected" in error_of(None, ("SOLVER.WEIGHT_DECAY_BIAS", "null"))


def test_a_number_for_text_is_refused_in_a_file(write_yaml):
    file = write_yaml("OUTPUT_DIR: 2024\n")
    message = error_of(file)
    assert str(file) in message
    assert "OUTPUT_DIR is 2024, of type int, but a str is expected" in message
    assert "quotes" in message


KEYS = {
    bool: ("SOLVER.NESTEROV", "MODEL.MASK_ON", "CUDNN_BENCHMARK"),
    int: ("SOLVER.MAX_ITER", "SEED", "MODEL.RPN.BATCH_SIZE_PER_IMAGE"),
    float: ("SOLVER.BASE_LR", "MODEL.RPN.NMS_THRESH", "MODEL.ROI_HEADS.SCORE_THRESH_TEST"),
    tuple: ("SOLVER.STEPS", "MODEL.CASCADE.EXIT.THRESHOLDS", "INPUT.MIN_SIZE_TRAIN"),
}
# Beyond 2**53 a float cannot hold every int.
INTEGERS = st.integers(-(2**53), 2**53)
NUMBERS = st.one_of(INTEGERS, st.floats(allow_nan=False, allow_infinity=False))
VALUES = {bool: st.booleans(), int: INTEGERS, float: NUMBERS, tuple: st.tuples(NUMBERS)}
ASSIGNMENTS = st.sampled_from(list(KEYS)).flatmap(
    lambda kind: st.tuples(st.sampled_from(KEYS[kind]), VALUES[kind])
)


@settings(max_examples=50)
@given(assignment=ASSIGNMENTS)
def test_a_value_means_the_same_in_a_file_and_on_the_command_line(assignment, tmp_path_factory):
    key, value = assignment
    nested: object = list(value) if isinstance(value, tuple) else value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    file = tmp_path_factory.mktemp("same") / "config.yaml"
    file.write_text(yaml.safe_dump(nested))
    from_file, from_option = load_config(file), load_config(None, [key, repr(value)])
    assert from_file == from_option
    read = from_file
    for part in key.split("."):
        read = read[part]
    assert read == value


# ---- what is refused


def test_an_unknown_key_names_file_key_and_the_nearest(write_yaml):
    file = write_yaml("MODEL:\n  ROI_HEADS:\n    NUM_CLASES: 3\n")
    message = error_of(file)
    assert str(file) in message
    assert "MODEL.ROI_HEADS.NUM_CLASES." in message
    assert "Did you mean MODEL.ROI_HEADS.NUM_CLASSES?" in message


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("MODEL.ROI_HEAD.NUM_CLASSES", "MODEL.ROI_HEADS.NUM_CLASSES"),
        ("solver.base_lr", "SOLVER.BASE_LR"),
        ("MODEL.EXIT.THRESHOLDS", "MODEL.CASCADE.EXIT.THRESHOLDS"),
        ("MODEL.DEVICE.NAME", "MODEL.DEVICE"),
        ("SOLVER.BASE_LR.", "SOLVER.BASE_LR"),
    ],
)
def test_the_nearest_key_is_suggested(key, nearest):
    assert f"there is no key {key}. Did you mean {nearest}?" in error_of(None, (key, "1"))


def test_no_suggestion_is_better_than_a_wild_one():
    assert "No known key resembles it." in error_of(None, ("XYZZY", "1"))
    assert "begin with - come before the keys" in error_of(None, ("--resume", "1"))


def test_an_error_in_a_base_names_the_base(write_yaml):
    base = write_yaml("SEEED: 1\n", "base.yaml")
    file = write_yaml("_BASE_: base.yaml\n", "top.yaml")
    message = error_of(file)
    assert str(base) in message
    assert "top.yaml" not in message


@pytest.mark.parametrize("value", ["3", "null", "[1]"])
def test_a_value_for_a_group_of_keys(value, write_yaml):
    message = error_of(write_yaml(f"SOLVER:\n  AMP: {value}\n"))
    assert "SOLVER.AMP" in message
    assert "group of keys: ENABLED" in message


def test_files_that_cannot_be_read(tmp_path):
    missing = tmp_path / "missing.yaml"
    assert error_of(missing) == f"{missing}: there is no such configuration file."
    assert f"{tmp_path}: cannot be read" in error_of(tmp_path)


def test_an_option_is_not_executed(tmp_path):
    trace = tmp_path / "executed"
    cfg = load_config(None, ["OUTPUT_DIR", f"__import__('os').mkdir('{trace}')"])
    assert cfg.OUTPUT_DIR.startswith("__import__")
    assert not trace.exists()


def test_bases_that_lead_nowhere_or_in_a_circle(write_yaml, tmp_path):
    file = write_yaml("_BASE_: missing.yaml\n")
    message = error_of(file)
    assert message.startswith(f"{tmp_path / 'missing.yaml'}: there is no such")
    assert message.endswith(f"It is a _BASE_ of {file}.")
    message = error_of(write_yaml("_BASE_: [a.yaml, 3]\n"))
    assert "give a path or a list of paths" in message
    assert "there is no key _BASE_.a" in error_of(write_yaml("_BASE_: {a: b}\n"))
    write_yaml("_BASE_: b.yaml\n", "a.yaml")
    write_yaml("_BASE_: a.yaml\n", "b.yaml")
    assert "leads back to this file" in error_of(tmp_path / "a.yaml")
    own = write_yaml("_BASE_: self.yaml\n", "self.yaml")
    assert "leads back to this file" in error_of(own)


def test_a_base_is_only_known_in_files():
    assert "no key _BASE_" in error_of(None, ("_BASE_", "a.yaml"))


def test_another_version_of_the_tree(write_yaml):
    message = error_of(write_yaml("VERSION: 1\nMODEL: {RPN: {SCALES: 1}}\n"))
    assert "VERSION is 1, but only 2 is read" in message


@pytest.mark.parametrize("opts", [["SEED"], ["SEED", "1", "OUTPUT_DIR"], ["SEED=1"]])
def test_options_come_in_pairs(opts):
    message = error_of(None, tuple(opts))
    assert re.search(rf"there are {len(opts)} items", message)
    assert "KEY VALUE" in message


# ---- files that come with the package


@pytest.mark.parametrize(
    "name", ["COCO-Detection/cascade_rcnn_R_50_FPN_1x.yaml", "exits/mobile.yaml"]
)
def test_a_shipped_configuration_by_its_address(name, write_yaml):
    expected = load_config(CONFIGS / name)
    assert load_config(f"cascade_det://{name}") == expected
    assert load_config(config_path(name)) == expected
    assert load_config(write_yaml(f"_BASE_: cascade_det://{name}\n")) == expected
    top = write_yaml(f"_BASE_: [cascade_det://{name}]\nSEED: 5\n")
    assert load_config(top).SEED == 5


@pytest.mark.parametrize(
    "name",
    [
        "../configs/exits/mobile.yaml",
        "../errors.py",
        str(CONFIGS / "exits/mobile.yaml"),
        "exits",
        "",
    ],
)
def test_an_address_never_leaves_the_folder(name, write_yaml):
    assert "there is no such configuration" in error_of(f"cascade_det://{name}")
    file = write_yaml(f"_BASE_: cascade_det://{name}\n")
    assert error_of(file).startswith(f"{file}:1: _BASE_: cascade_det://{name}: there is no")


def test_an_unknown_address_lists_near_names():
    message = error_of("cascade_det://COCO-Detection/cascade_rcnn_R_50_FPN_2x.yaml")
    assert "Similar names: COCO-Detection/cascade_rcnn_R_50_FPN_" in message
    assert "exits/mobile.yaml" in error_of("cascade_det://xyzzy")


# ---- the length of a training


def test_iterations_on_top_of_epochs_are_refused(write_yaml):
    base = write_yaml("SOLVER: {MAX_ITER: 30}\nCASCADE:\n  EPOCHS: 2.5\n", "base.yaml")
    file = write_yaml("_BASE_: base.yaml\nSEED: 3\nSOLVER: {MAX_ITER: 9}\n")
    for files, opts, where in (
        (base, ["SOLVER.MAX_ITER", "9"], "command line"),
        (file, [], f"{file}:3"),
        ([base, write_yaml("SOLVER: {MAX_ITER: 9}", "b.yaml")], [], f"{file.parent}/b.yaml:1"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(files, opts)
        assert str(caught.value) == (
            f"{where}: SOLVER.MAX_ITER is 9, but CASCADE.EPOCHS is 2.5 ({base}:3), from which the "
            "iterations follow. Set CASCADE.EPOCHS instead, or to 0 as well."
        )


def test_iterations_and_epochs_that_do_not_contradict(write_yaml):
    base = write_yaml("CASCADE: {EPOCHS: 2.5}\nSOLVER: {MAX_ITER: 30}\n")  # as it is dumped
    for opts, wanted in (
        ([], (30, 2.5)),
        (["CASCADE.EPOCHS", "4"], (30, 4.0)),
        (["CASCADE.EPOCHS", "0", "SOLVER.MAX_ITER", "9"], (9, 0.0)),
        (["SOLVER.MAX_ITER", "9", "CASCADE.EPOCHS", "0"], (9, 0.0)),
        (["SOLVER.MAX_ITER", "9", "CASCADE.EPOCHS", "3"], (9, 3.0)),
    ):
        cfg = load_config(base, opts)
        found = cfg.SOLVER.MAX_ITER, cfg.CASCADE.EPOCHS
        assert found == wanted
    assert load_config(None, ["SOLVER.MAX_ITER", "9"]).SOLVER.MAX_ITER == 9

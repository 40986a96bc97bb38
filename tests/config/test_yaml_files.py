"""Broken and hostile YAML: refused with file, line and reason, quickly, and with nothing run."""

from __future__ import annotations

import os
import traceback
import tracemalloc
from pathlib import Path

import pytest
import yaml

from cascade_det.config import load_config, merge_config
from cascade_det.config.yaml_files import Entry, read_entries, read_text
from cascade_det.errors import ConfigError


def laughs(pairs: str, first: str) -> str:
    """Each of 30 names stands for two of the one before: 2 ** 30 values once written out."""
    lines = [f"N0: &n0 {first}"]
    lines += [f"N{i}: &n{i} " + pairs.format(f"*n{i - 1}") for i in range(1, 31)]
    return "\n".join(lines) + "\n"


BAD = {
    # ---- code, aliases, depth, size
    "call": ("SEED: !!python/object/apply:os.mkdir [executed]", ":1:", "no tag is ever executed"),
    "new": ("A: 1\nSEED: !!python/object/new:os.mkdir [x]", ":2:", "no tag is ever executed"),
    "path": (
        "SEED: !!python/object/apply:pathlib.Path.touch\n- executed",
        "no tag is ever executed",
    ),
    "root": ("!!python/object/apply:os.mkdir [executed]", ":1:", "no tag is ever executed"),
    "key": ("? !!python/object/apply:os.mkdir [executed]\n: 1", ":1:", "no tag is ever executed"),
    "module": ("SEED: !!python/module:antigravity", ":1:", "no tag is ever executed"),
    "own_tag": ("SEED: !mine 1", ":1:", "has the tag !mine"),
    "lists_of_lists": (laughs("[{0}, {0}]", "[x]"), ":1", "more than 10000 values"),
    "mappings_of_mappings": (laughs("{{A: {0}, B: {0}}}", "{A: 1}"), ":1", "more than 10000"),
    "merges_of_merges": (laughs("{{<<: [{0}, {0}]}}", "{A: 1}"), ":1", "more than 10000 values"),
    "inside_itself": ("SEED: &a [*a]", ":1:", "more than 10000 values"),
    "merged_into_itself": ("SOLVER: &a\n  <<: *a", ":1:", "more than 10000 values"),
    "deep_lists": ("SEED:" + "\n [" * 5000, "nested too deeply"),
    "deep_mappings": ("{A: " * 5000, "nested too deeply"),
    "long_list": ("SOLVER: {STEPS: [" + "1," * 10_000 + "]}", ":1:", "more than 10000 values"),
    "huge": ("# comment\n" * 30_000, "more than 256 KiB"),
    # ---- no mapping of keys
    "empty": ("", "empty"),
    "comment": ("# nothing but a comment", "empty"),
    "list": ("- a\n- b", "holds a list, not a mapping"),
    "value": ("just text", "holds a single value, not a mapping"),
    "dotted": ("MODEL.DEVICE: cpu", ":1:", "MODEL.DEVICE is not a key"),
    "number_as_key": ("MODEL: {1: cpu}", ":1:", "MODEL.1 is not a key"),
    # ---- the same key twice
    "twice": ("SEED: 1\nOUTPUT_DIR: a\nSEED: 2", ":3:", "SEED is set here", "in line 1 already"),
    "nested_twice": (
        "SOLVER:\n  GAMMA: 1\n  'GAMMA': 2",
        ":3:",
        "GAMMA is set here",
        "in line 2 already",
    ),
    "group_twice": (
        "SOLVER: {GAMMA: 1}\nSOLVER: {SEED: 1}",
        ":2:",
        "SOLVER is set here",
        "in line 1",
    ),
    # ---- no YAML
    "open_mapping": ("MODEL: {A: 1\nB: }", "not valid YAML"),
    "tab": ("SOLVER:\n\tGAMMA: 1", ":2:", "not valid YAML", "spaces, not with tabs"),
    "open_list": ("SEED: 1\nSOLVER: [1,\n  2", "not valid YAML", "flow sequence (line 2)"),
    "bad_escape": ('SEED: "\\UFFFFFFFF"', ":1:", "not valid YAML"),
    "bad_version": ("%YAML " + "9" * 5000 + ".1\n--- {}", "not valid YAML"),
    "no_anchor": ("SEED: *nowhere", ":1:", "not valid YAML", "undefined alias"),
    "two_documents": ("SEED: 1\n---\nSEED: 2", ":2:", "not valid YAML"),
    "control_character": ("SEED: \x01", "not valid YAML: character #x0001 at position 6"),
    "wrong_merge": ("SOLVER: {<<: 3}", ":1:", "not valid YAML"),
    "list_as_key": ("SOLVER: {[1, 2]: 3}", ":1:", "is not a key"),
    "list_as_inner_key": ("DATASETS: {TRAIN: [{[1]: 2}]}", ":1:", "not valid YAML"),
    # ---- values that no key takes
    "date": ("OUTPUT_DIR: 2024-01-31", ":1:", "2024-01-31 has the tag !!timestamp", "quotes"),
    "no_date": ("OUTPUT_DIR: 2024-13-41", ":1:", "!!timestamp"),
    "set": ("SOLVER: {STEPS: !!set {1, 2}}", ":1:", "!!set"),
    "binary": ("OUTPUT_DIR: !!binary aGVsbG8=", ":1:", "!!binary"),
    "ordered": ("SOLVER: !!omap [GAMMA: 1]", ":1:", "!!omap"),
    "equals": ("OUTPUT_DIR: =", ":1:", "!!value"),
    "no_digits": ("SEED: 0x_", ":1:", "value of SEED is not a number or word"),
    "no_bool": ("SEED: !!bool maybe", ":1:", "value of SEED is not a number or word"),
    "empty_number": ("SEED: !!int", ":1:", "value of SEED is not a number or word"),
    "empty_float": ("SOLVER: {BASE_LR: !!float ''}", "value of SOLVER.BASE_LR is not a number"),
    "no_text": ("OUTPUT_DIR: !!str [a]", ":1:", "expected a scalar"),
    "long_decimal": ("\nSEED: " + "9" * 5000, ":2:", "value of SEED is not a number or word"),
    "long_hexadecimal": ("SEED: 0x" + "f" * 5000, ":1:", "SEED holds", "64 bits"),
    "long_float": ("SOLVER: {BASE_LR: 1" + "0" * 400 + "}", ":1:", "BASE_LR holds", "64 bits"),
    "long_in_list": ("SOLVER: {STEPS: [1, 9223372036854775808]}", "STEPS holds", "64 bits"),
    "null_character": ('OUTPUT_DIR: "a\\0b"', ":1:", "null character"),
    "mapping_in_list": ("DATASETS: {TRAIN: [a: 1]}", ":1:", "type dict inside a list"),
    "mapping_for_value": ("SEED: {}", ":1:", "SEED is {}, of type dict"),
    "unknown_empty_group": ("SOLVR: {}", ":1:", "no key SOLVR"),
    "long_tag": ("SEED: !" + "x" * 9000, ":1:", "has the tag !xxx"),
    "long_alias": ("SEED: *" + "x" * 9000, ":1:", "undefined alias"),
    "long_key": ("Q" * 1000 + ": 1", "there is no key QQQ"),
    "flood": ("SEED: " + "x" * 9000, "SEED is 'xxx", "...", "of type str"),
}


@pytest.mark.parametrize("name", BAD)
def test_it_is_refused_with_file_and_reason(name, write_yaml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, *words = BAD[name]
    file = write_yaml(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    message = str(caught.value)
    assert message.startswith(str(file))
    assert message.count(str(file)) == 1
    for word in words:
        assert word in message
    assert len(message) < 800 + len(str(file))
    assert os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize("name", ["lists_of_lists", "mappings_of_mappings", "merges_of_merges"])
def test_a_bomb_takes_no_memory(name, write_yaml):
    file = write_yaml(BAD[name][0])
    tracemalloc.start()
    with pytest.raises(ConfigError):
        load_config(file)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 5e6


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("SEED: 1  # größer".encode("latin-1"), "at byte 13). Save it as UTF-8"),
        ("SEED: 1".encode("utf-16"), "at byte 0). Save it as UTF-8"),
        (bytes(range(256)), "Save it as UTF-8"),
        (b"PK\x03\x04" + bytes(300_000), "more than 256 KiB"),
    ],
)
def test_files_that_are_no_text(content, words, tmp_path):
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "model.pth")
    assert words in str(caught.value)


@pytest.mark.parametrize("path", ["a\0b.yaml", "x" * 300 + ".yaml", "", "~no_such_user/a.yaml"])
def test_paths_that_are_none(path, write_yaml):
    with pytest.raises(ConfigError):
        load_config(path)
    file = write_yaml(yaml.safe_dump({"_BASE_": path}))
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value).endswith(f"It is a _BASE_ of {file}.")


def test_a_link_to_itself_and_an_endless_file(tmp_path):
    link = tmp_path / "link.yaml"
    link.symlink_to(link)
    for path in (link, Path("/dev/zero")):
        with pytest.raises(ConfigError, match=f"{path}: "):
            load_config(path)


def test_bases_of_bases_without_end(write_yaml):
    for i in range(30):
        write_yaml(f"_BASE_: [{i + 1}.yaml, {i + 1}.yaml]\nSEED: 1\n", f"{i}.yaml")
    write_yaml("SEED: 2\n", "30.yaml")
    with pytest.raises(ConfigError, match="one of more than 100 files"):
        load_config(write_yaml("_BASE_: 0.yaml\n"))


def test_the_error_of_an_inner_base_names_who_asked_for_it(write_yaml, tmp_path):
    write_yaml("_BASE_: inner.yaml\n", "outer.yaml")
    inner = write_yaml("SEED: [\n", "inner.yaml")
    with pytest.raises(ConfigError) as caught:
        load_config(write_yaml("_BASE_: outer.yaml\n"))
    assert str(caught.value).startswith(f"{inner}:2: this cannot be read as a configuration")
    assert f"It is a _BASE_ of {tmp_path / 'outer.yaml'}." in str(caught.value)
    with pytest.raises(ConfigError, match=r"inner\.yaml:2: this is not valid YAML"):
        load_config(inner)


@pytest.mark.parametrize(
    "text",
    [
        'DATASETS: {TRAIN: ("a",)}',
        'DATASETS: {TRAIN: ("a", "b")}',
        "DATASETS: {TRAIN: (a,)}",
        "SOLVER: {STEPS: (100, 200), MAX_ITER: 300}",
        "MODEL: {PIXEL_MEAN: (1.0, 2.0, 3.0)}",
        "SEED: 1\nMODEL: {CASCADE: {EXIT: {THRESHOLDS: (0.9, 0.8)}}}",
        'CASCADE: {DATASETS: [("a", "b", "c")]}',
        "MODEL: {ROI_BOX_CASCADE_HEAD: {BBOX_REG_WEIGHTS: [(10, 10, 5, 5)]}}",
    ],
)
def test_tuples_in_flow_style_are_told(text, write_yaml):
    """A comma ends a value there: ``("a"`` would be text, and no list."""
    file = write_yaml(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value).startswith(f"{file}:{1 + text.count(chr(10))}: ")
    assert "(a, b) falls apart. Write [a, b]" in str(caught.value)


def test_brackets_that_are_closed_are_text_or_values(write_yaml):
    cfg = load_config(write_yaml("{OUTPUT_DIR: runs (old), SEED: (5)}\n"))
    assert (cfg.OUTPUT_DIR, cfg.SEED) == ("runs (old)", 5)
    assert load_config(write_yaml('DATASETS:\n  TRAIN: ("a",)\n')).DATASETS.TRAIN == ("a",)


SECRET = "hunter2"
# What lies on a machine beside configurations; the line that is at fault, if there is one.
OTHER_FILES = {
    "passwd": (f"root:x:0:0:{SECRET}:/root:/bin/bash\nbin:x:1:1::/bin:/bin/sh\n", ""),
    "shadow": (f"root:$y$j9T${SECRET}:19000:0:99999:7:::\n", ":1"),
    "env": (f"TOKEN={SECRET}\n", ""),
    "secrets": (f"{SECRET}: 1\n", ":1"),
    "json": (f'{{"{SECRET}": "{SECRET}"}}', ":1"),
    "key": (f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----\n", ""),
    "toml": (f'[a]\ntoken="{SECRET}"\n', ":2"),
    "tag": (f"a:\n  b: !{SECRET} x\n", ":2"),
    "handle": (f"a: !{SECRET}!x y\n", ":1"),
    "alias": (f"a: *{SECRET}\n", ":1"),
    "anchor": (f"a: &{SECRET} 1\nb: &{SECRET} 2\n", ":2"),
    "twice": (f"{SECRET}: 1\n{SECRET}: 2\n", ":2"),
    "dotted": (f"SEED: 1\n{SECRET}.x: 1\n", ":2"),
    "number": (f"{SECRET}: 0x_\n", ":1"),
}


@pytest.mark.parametrize(("content", "line"), OTHER_FILES.values(), ids=OTHER_FILES)
def test_a_file_that_a_configuration_names_is_not_quoted(content, line, write_yaml, tmp_path):
    other = write_yaml(content, "other")
    file = write_yaml("_BASE_: other\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value).startswith(f"{other}{line}: ")
    assert f"It is a _BASE_ of {file}" in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_base_that_is_no_file_is_not_waited_for(write_yaml, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(ConfigError, match=r"is not a file\. It is a _BASE_ of"):
            load_config(write_yaml(f"_BASE_: {name}\n"))


# ---- what is plain is read


def test_entries_with_their_lines(write_yaml):
    file = write_yaml(
        "# first\nA: 1\nB:\n  C: [x, [2.5]]\n  D: {E: null, F: {}}\nG: |\n  text\nH: yes\n"
    )
    assert read_entries(read_text(file), file) == [
        Entry("A", 1, 2),
        Entry("B.C", ["x", [2.5]], 4),
        Entry("B.D.E", None, 5),
        Entry("B.D.F", {}, 5),
        Entry("G", "text\n", 6),
        Entry("H", True, 8),
    ]


def test_aliases_and_merge_keys_mean_what_they_mean_in_yaml(write_yaml):
    text = (
        "MODEL:\n"
        "  RPN: &rpn {NMS_THRESH: 0.6, BATCH_SIZE_PER_IMAGE: 8}\n"
        "  ROI_HEADS:\n"
        "    <<: {BATCH_SIZE_PER_IMAGE: 9, POSITIVE_FRACTION: 0.5}\n"
        "    BATCH_SIZE_PER_IMAGE: 10\n"
        "  PIXEL_MEAN: &three [1.0, 2.0, 3.0]\n"
        "  PIXEL_STD: *three\n"
    )
    model = load_config(write_yaml(text)).MODEL
    content = yaml.safe_load(text)["MODEL"]
    assert model.ROI_HEADS.BATCH_SIZE_PER_IMAGE == 10
    for group in ("RPN", "ROI_HEADS"):
        assert {key: model[group][key] for key in content[group]} == content[group]
    assert model.PIXEL_STD == model.PIXEL_MEAN == content["PIXEL_MEAN"]
    assert model.PIXEL_STD is not model.PIXEL_MEAN


def test_a_byte_order_mark_and_windows_lines(tmp_path):
    file = tmp_path / "windows.yaml"
    file.write_bytes(b"\xef\xbb\xbfSEED: 4\r\nOUTPUT_DIR: b\r\n")
    assert [(e.key, e.value, e.line) for e in read_entries(read_text(file), file)] == [
        ("SEED", 4, 1),
        ("OUTPUT_DIR", "b", 2),
    ]


# ---- where values come from


def test_history_has_every_value_in_order(write_yaml):
    base = write_yaml("SOLVER:\n  GAMMA: 0.5\nSEED: 1\n", "base.yaml")
    file = write_yaml("_BASE_: base.yaml\n\nSOLVER: {GAMMA: 1}\n")
    cfg = load_config(None)
    history = merge_config(cfg, file, ["SOLVER.STEPS", "[7]", "SOLVER.GAMMA", "0.25"])
    told = {key: [(s.value, s.source) for s in settings] for key, settings in history.items()}
    assert told == {
        "SOLVER.GAMMA": [
            (0.1, "default"),
            (0.5, f"{base}:2"),
            (1.0, f"{file}:3"),
            (0.25, "command line"),
        ],
        "SEED": [(-1, "default"), (1, f"{base}:3")],
        "SOLVER.STEPS": [((30000,), "default"), ((7,), "command line")],
    }


def test_options_that_no_key_takes():
    for value in ("[1j]", "[b'a']", "[...]", "[2 ** 3]", "[18446744073709551616]", "[None, {}]"):
        with pytest.raises(ConfigError, match=r"^command line: TEST\.AUG\.MIN_SIZES "):
            load_config(None, ["TEST.AUG.MIN_SIZES", value])
    for value in ("{0x" + "f" * 5000 + "}", "0x" + "f" * 5000, "(" * 300, "-" * 9000 + "1"):
        with pytest.raises(ConfigError, match=r"^command line: SEED "):
            load_config(None, ["SEED", value])
    with pytest.raises(ConfigError, match="VERSION is 1, but only 2"):
        load_config(None, ["VERSION", "1"])

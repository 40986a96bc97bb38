"""Any file and any option is a configuration that can be used, or a ``ConfigError``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cascade_det import config
from cascade_det.errors import ConfigError

BASE = Path(__file__).parents[2] / "configs" / "Base-Cascade-RCNN-FPN.yaml"
DEFAULTS = config.flat(config.load_config(BASE))
VERY_LONG = "0x" + "f" * 6000  # Python makes an int of it, but no text of the int

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([2**63, -(2**63), 10**400, 1e308, math.inf, math.nan, VERY_LONG]),
    st.sampled_from(["", "cuda:9", "(1, 2)", "[[1], [2]]", "nan", "1e3", "{1}", "\0", "~no/x"]),
    st.dates(),
    st.binary(max_size=4),
)
NESTED_JUNK = st.recursive(
    JUNK,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    ),
    max_leaves=8,
)
TEXTS = sorted({value for value in DEFAULTS.values() if isinstance(value, str)})
LISTS = [value for value in DEFAULTS.values() if isinstance(value, (list, tuple)) and value]
ITEMS = st.sampled_from([item for value in LISTS for item in value])
FITTING: dict[type, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(-1, 12) | st.sampled_from([18, 32, 34, 50, 64, 101, 256, 10**6]),
    float: st.floats(0, 1) | st.floats(-1, 100),
    str: st.sampled_from([*TEXTS, "GN", "BN", "range", "SyncBN", "CascadeROIHeads", "last"]),
    list: st.lists(ITEMS, max_size=5) | st.sampled_from(LISTS),
    tuple: st.lists(ITEMS, max_size=5) | st.sampled_from(LISTS),
}
ODD_KEYS = st.sampled_from(["VERSION", "_BASE_", "MODEL", "SOLVER.AMP", "NO_SUCH.KEY", "", "."])
# Most values are of the key's type, so that many get as far as the checks of keys together.
PAIRS = st.one_of(
    *[
        st.sampled_from([key for key in DEFAULTS if type(DEFAULTS[key]) is kind]).flatmap(
            lambda key, values=values: st.tuples(st.just(key), values)
        )
        for kind, values in FITTING.items()
    ],
    st.tuples(st.sampled_from(list(DEFAULTS)) | ODD_KEYS, NESTED_JUNK),
)
SETTINGS = st.lists(PAIRS, max_size=4).map(dict)

TOKENS = (
    *("SEED", "MODEL", "SOLVER", "STEPS", "BASE_LR", "_BASE_", "<<", "1", "0x_", VERY_LONG),
    *(": ", ":", "\n", "\n  ", "- ", "? ", ", ", "[", "]", "{", "}", "#", "|\n", "---\n", "...\n"),
    *("&a ", "*a", "&b ", "*b", "!!", "!!set ", "!!map ", "!!int ", "!!bool ", "!!binary ", "!x "),
    *("!<", "!!python/object/apply:os.getcwd ", "!!python/name:os.sep ", "%YAML 1.", "%TAG ! x:"),
    *("'", '"', "\\U", "\\x", "ffffffff", "\t", "\0", "\ufeff", "2001-13-45", "=", "~", ".nan"),
)
YAML_LIKE = st.lists(st.sampled_from(TOKENS), max_size=25).map("".join)
SHIPPED = BASE.read_bytes()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A shipped file with a piece cut out, doubled or overwritten."""
    start = draw(st.integers(0, len(SHIPPED)))
    end = draw(st.integers(start, min(len(SHIPPED), start + 200)))
    piece = draw(st.sampled_from([b"", SHIPPED[start:end] * 2]) | st.binary(max_size=6))
    return SHIPPED[:start] + piece + SHIPPED[end:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def use(file: Path, opts: list[Any], folder: Path) -> None:
    """Load and check; what passes can be translated, written and read again."""
    try:
        cfg = config.load_config(file, opts)
        config.check_config(cfg)
    except ConfigError:
        return
    for arguments in ("backbone", "rpn", "pooler", "box_head", "cascade", "exit", "trainer"):
        getattr(config, f"{arguments}_arguments")(cfg)
    dumped = folder / "dumped.yaml"
    dumped.write_text(cfg.dump())
    assert config.changed_keys(cfg, config.load_config(dumped)) == {}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, name = key.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                break
        else:
            node[name] = value
    return tree


OPTIONS = SETTINGS | st.dictionaries(st.sampled_from(list(DEFAULTS)), YAML_LIKE, max_size=3)


@settings(max_examples=120)
@given(content=st.binary(max_size=60) | damaged() | YAML_LIKE.map(str.encode))
@example(content=b'SEED: "\\UFFFFFFFF"')
@example(content=b"SEED: 0b_")
def test_any_bytes_are_a_configuration_or_an_error(folder, content):
    file = folder / "config.yaml"
    file.write_bytes(content)
    use(file, [], folder)


@settings(max_examples=80)
@given(flat=SETTINGS)
def test_any_values_in_a_file_are_a_configuration_or_an_error(folder, flat):
    text = yaml.dump({"_BASE_": str(BASE), **nested(flat)}, default_flow_style=None)
    file = folder / "config.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    use(file, [], folder)


@settings(max_examples=80)
@given(flat=OPTIONS)
def test_any_options_are_a_configuration_or_an_error(folder, flat):
    use(BASE, [item for pair in flat.items() for item in pair], folder)

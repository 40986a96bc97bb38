"""The table of keys, and the page that is made of it."""

from __future__ import annotations

from pathlib import Path

from cascade_det.config import check_config, flat, get_cfg, load_config
from cascade_det.config.keys_page import page
from cascade_det.config.tree import GROUPS, KEYS
from cascade_det.config.unread_keys import UNREAD_KEYS

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_generator_writes():
    assert (ROOT / "docs" / "keys.md").read_text(encoding="utf-8") == page()


def test_every_key_is_read_or_only_accepted():
    rows = [f"{group.node}.{name}".lstrip(".") for group in GROUPS for name in group.keys]
    assert sorted([*rows, *UNREAD_KEYS]) == sorted(KEYS) == sorted(flat(get_cfg()))
    assert all(KEYS[name].help for name in rows)


def test_our_keys_have_a_sentence_and_accept_their_defaults():
    for name, key in KEYS.items():
        if name.startswith(("CASCADE.", "MODEL.CASCADE.")):
            assert key.help.endswith("."), name
            assert key.values.accepts(key.default), name
            assert f"| `{name.rpartition('.')[2]}` |" in page()


def test_keys_that_the_standalone_host_reads_are_on_the_page():
    """Every key that a shipped cascade sets to something else than Detectron2's default."""
    defaults = flat(get_cfg())
    for file in (ROOT / "configs" / "COCO-Detection").glob("*.yaml"):
        cfg = load_config(file)
        check_config(cfg)
        for name, value in flat(cfg).items():
            if value != defaults[name]:
                assert KEYS[name].help, name

#!/usr/bin/env python3
"""Show a configuration with all its values, and where each of them comes from.

python tools/print_config.py --config-file configs/quick_schedules/demo.yaml [KEY VALUE ...]
python tools/print_config.py --config-file ... --changed    # only what differs from the defaults

The output is YAML that can be used as a --config-file itself.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Collection, Iterator
from typing import Any

from cascade_det.commands.arguments import add_config_options


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Show a configuration and where each value comes from."
    )
    parser.add_argument(
        "--config-file",
        action="append",
        metavar="YAML",
        help="later ones on top; without it: the defaults",
    )
    parser.add_argument(
        "--changed", action="store_true", help="only the values that differ from the defaults"
    )
    add_config_options(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    _parse(None)  # Help and errors do not wait for the imports below.


import yaml
from fvcore.common.config import CfgNode

from cascade_det.commands.errors import without_traceback
from cascade_det.config import (
    History,
    Setting,
    changed_keys,
    check_config,
    flat,
    get_cfg,
    merge_config,
)
from cascade_det.config.keys import as_lists

_COMMENT_COLUMN = 64


@without_traceback
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parse(argv)
    cfg = get_cfg()
    history = merge_config(cfg, args.config_file, args.opts)
    keys = changed_keys(get_cfg(), cfg) if args.changed else flat(cfg)
    print("\n".join(lines(cfg, keys, history)) or "# Every value is the default.")
    if args.config_file:  # the defaults alone describe no cascade
        # Last, since whoever asks why keys contradict each other wants to see them.
        check_config(cfg)
    return 0


def lines(cfg: CfgNode, keys: Collection[str], history: History) -> Iterator[str]:
    """YAML of the given full keys, each with a comment on where its value comes from."""
    open_groups: list[str] = []
    for full_key, value in flat(cfg).items():
        if full_key not in keys:
            continue
        *groups, name = full_key.split(".")
        same = 0
        while same < len(groups) and groups[: same + 1] == open_groups[: same + 1]:
            same += 1
        yield from (f"{'  ' * depth}{groups[depth]}:" for depth in range(same, len(groups)))
        open_groups = groups
        setting = f"{'  ' * len(groups)}{name}: {_in_one_line(value)}"
        yield f"{setting:<{_COMMENT_COLUMN}} # {_origin(history.get(full_key, []))}"


def _origin(settings: list[Setting]) -> str:
    if not settings:
        return "default"
    *_, replaced, last = settings
    if as_lists(replaced.value) == as_lists(last.value):
        return _printable(last.source)
    value, source = _in_one_line(replaced.value), _printable(replaced.source)
    before = f"the default {value}" if source == "default" else f"{value} of {source}"
    return f"{_printable(last.source)}, replaces {before}"


def _in_one_line(value: Any) -> str:
    """YAML on one line; tuples become lists, as in every file."""
    text = yaml.safe_dump(as_lists(value), default_flow_style=True, width=sys.maxsize)
    return text.removesuffix("\n").removesuffix("\n...")


def _printable(source: str) -> str:
    """A file's name may hold what would end a comment."""
    return source if source.isprintable() else repr(source)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # "| head" ends it without a traceback
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())

"""Print a configuration with all its values, and the origin of each.

cascade-det print-config --config-file cells.yaml [KEY VALUE ...]
cascade-det print-config --config-file ... --changed    # only what differs from the defaults

The output is YAML that can itself be used as a --config-file.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from cascade_det.commands.arguments import config_parser
from cascade_det.commands.errors import without_traceback
from cascade_det.parallel.signals import handled

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode

    from cascade_det.config import History, Setting

_COMMENT_COLUMN = 64


def _parse(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    parser = config_parser(prog, __doc__, required=False, text="without one: the defaults; ")
    parser.add_argument(
        "--changed", action="store_true", help="only values that differ from the defaults"
    )
    return parser.parse_args(argv)


@without_traceback
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parse(argv, prog)
    from cascade_det.config import changed_keys, check_config, flat, get_cfg, merge_config

    cfg = get_cfg()
    history = merge_config(cfg, args.config_file, args.opts)
    keys = changed_keys(get_cfg(), cfg) if args.changed else flat(cfg)
    text = "\n".join(_lines(cfg, keys, history)) or "# Every value is the default."
    with handled({signal.SIGPIPE: signal.SIG_DFL}):  # "| head" ends it without a traceback
        print(text, flush=True)
    if args.config_file:  # the defaults alone describe no cascade
        # Last, so that keys which contradict each other are printed before the error.
        check_config(cfg)
    return 0


def _lines(cfg: CfgNode, keys: Collection[str], history: History) -> Iterator[str]:
    """YAML of the given full keys, with the origin of each value as a comment."""
    from cascade_det.config import flat

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
    from cascade_det.config.tree import as_lists

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
    from cascade_det.config.tree import as_lists

    text = yaml.safe_dump(as_lists(value), default_flow_style=True, width=sys.maxsize)
    return text.removesuffix("\n").removesuffix("\n...")


def _printable(source: str) -> str:
    """Escaped, since a file name may hold a line break, which would end the comment."""
    return source if source.isprintable() else repr(source)

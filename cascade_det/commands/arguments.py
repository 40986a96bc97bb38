"""What the arguments of all commands have in common; imports nothing that takes long."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cascade_det.errors import CascadeDetError

_SEPARATORS = ("--opts", "--")
_Number = TypeVar("_Number", int, float)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Let a command take ``KEY VALUE ...`` at its end, with ``--opts`` or ``--`` before or without.

    Either ends the list of an option that takes several values. They are ``opts``, a list.
    """
    for name, text in (
        ("--opts", "configuration keys that override the files, such as SOLVER.MAX_ITER 1000"),
        ("opts", "the same; --opts is needed only after an option that takes several values"),
    ):
        parser.add_argument(
            name,
            nargs=argparse.REMAINDER,
            action=_ConfigOptions,
            default=[],
            metavar="KEY VALUE",
            help=text,
        )


class _ConfigOptions(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        given = [value for value in values or () if value not in _SEPARATORS]
        late = next((value for value in given if value.startswith("--")), None)
        if late is not None:
            # Else those that are required would be said to be missing.
            is_known = late.partition("=")[0] in re.findall(r"--[\w-]+", parser.format_usage())
            what = (
                "comes after keys: give options first, then KEY VALUE" if is_known else "is unknown"
            )
            parser.error(f"option {late} {what}")
        namespace.opts = [*namespace.opts, *given]


def real(least: float, most: float = math.inf) -> Callable[[str], float]:
    """The ``type`` of an argument: a finite number from ``least`` to ``most``, both included."""
    return _within(float, "number", least, most)


def whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    """The ``type`` of an argument: a whole number from ``least`` to ``most``, both included."""
    return _within(int, "whole number", least, most)


def check_output_file(output: Path, inputs: Iterable[str | os.PathLike[str] | None]) -> None:
    """Make sure that a command can write a file, and that it does not read the same one.

    Args:
        output: the file.
        inputs: names of files that are read; those that are not there, or ``None``, are nothing.

    Raises:
        CascadeDetError: it is one of the inputs, under whatever name, or a folder, a pipe or a
            device.
    """
    if output.is_dir():
        raise CascadeDetError(f"{output}: is a folder. Give the name of a file.")
    if output.exists() and not output.is_file():
        # As root, /dev/null would become a file.
        raise CascadeDetError(f"{output}: is no file, and would be replaced. Give another name.")
    for given in inputs:
        if given and output.exists() and os.path.exists(given) and os.path.samefile(output, given):
            raise CascadeDetError(f"{output}: would replace {given}. Give another name.")


def _within(
    convert: Callable[[str], _Number], kind: str, least: float, most: float
) -> Callable[[str], _Number]:
    def parse(text: str) -> _Number:
        value = convert(text)
        # NaN fails every comparison.
        if not least <= value <= most or value == math.inf:
            wanted = f"of {least} or more" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r}: give a {kind} {wanted}")
        return value

    parse.__name__ = kind  # argparse names it where the text cannot be converted
    return parse

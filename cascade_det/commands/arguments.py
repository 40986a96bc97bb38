"""Arguments that commands share; imports nothing heavy, so that help and errors come at once."""

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


def command_parser(prog: str | None, doc: str | None) -> argparse.ArgumentParser:
    """The parser of a command.

    Args:
        prog: what the user types, such as "cascade-det train"; ``None`` for a script's file name.
        doc: the docstring of the command's module, shown as it is.
    """
    return argparse.ArgumentParser(
        prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def config_parser(
    prog: str | None, doc: str | None, *, required: bool = True, text: str = ""
) -> argparse.ArgumentParser:
    """A :func:`command_parser` that takes ``--config-file`` and trailing keys."""
    parser = command_parser(prog, doc)
    add_config_file(parser, required=required, text=text)
    add_config_options(parser)
    return parser


def add_config_file(parser: argparse._ActionsContainer, *, required: bool, text: str = "") -> None:
    """Add ``--config-file``, which can be given several times; its value is a list of names."""
    parser.add_argument(
        "--config-file",
        required=required,
        action="append",
        metavar="YAML",
        help=f"{text}a file, or cascade_det://NAME for a shipped one; later ones override earlier",
    )


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add trailing ``KEY VALUE ...``, optionally after ``--opts`` or ``--``, as the list ``opts``.

    ``--opts`` and ``--`` end the list of an option that takes several values.
    """
    for name, text in (
        ("--opts", "the same; needed only after an option that takes several values"),
        ("opts", "configuration keys that override the files, such as SOLVER.MAX_ITER 1000"),
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
            # argparse would call a required option missing that stands here.
            is_known = late.partition("=")[0] in re.findall(r"--[\w-]+", parser.format_usage())
            what = (
                "comes after keys: give options first, then KEY VALUE" if is_known else "is unknown"
            )
            parser.error(f"option {late} {what}")
        namespace.opts = [*namespace.opts, *given]


def real(least: float, most: float = math.inf) -> Callable[[str], float]:
    """An argument's ``type``: a finite number from ``least`` to ``most``, both included."""
    return _within(float, "number", least, most)


def whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    """An argument's ``type``: a whole number from ``least`` to ``most``, both included."""
    return _within(int, "whole number", least, most)


def check_output_file(output: Path, inputs: Iterable[str | os.PathLike[str] | None]) -> None:
    """Check that ``output`` can be written and is none of a command's inputs.

    Args:
        output: the file to write.
        inputs: files to read; ``None`` and files that do not exist are ignored.

    Raises:
        CascadeDetError: ``output`` is one of the inputs (links are followed), a folder, a pipe or
            a device.
    """
    if output.is_dir():
        raise CascadeDetError(f"{output}: is a folder. Give the name of a file.")
    if output.exists() and not output.is_file():
        # As root, /dev/null would become a file.
        raise CascadeDetError(f"{output}: is not a regular file. Give another name.")
    for given in inputs:
        if given and output.exists() and os.path.exists(given) and os.path.samefile(output, given):
            raise CascadeDetError(f"{output}: would replace {given}. Give another name.")


def file_identity(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Device and inode, equal for all names of a file; ``None`` if it does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


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

    parse.__name__ = kind  # argparse's messages name the type
    return parse

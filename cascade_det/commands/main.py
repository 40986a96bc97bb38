"""Cascade R-CNN with confidence-gated early exits: one command for training to export."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import NamedTuple

from cascade_det import __version__
from cascade_det.commands.arguments import command_parser


class _Command(NamedTuple):
    module: str  # in cascade_det.commands
    summary: str
    flags: tuple[str, ...] = ()


COMMANDS = {
    "train": _Command("train", "train a cascade and evaluate it"),
    "eval": _Command("train", "evaluate a checkpoint: train --eval-only", ("--eval-only",)),
    "predict": _Command("predict", "detect objects in images"),
    "serve": _Command("serve", "show detections on a web page"),
    "calibrate": _Command("calibrate", "find exit thresholds for a target"),
    "export": _Command("export", "write a detector into one ONNX or torch.export file"),
    "benchmark": _Command("benchmark", "time the cascade beside Detectron2 and torchvision"),
    "check-data": _Command("check_data", "find errors in data sets"),
    "show-data": _Command("show_data", "draw training images with their boxes"),
    "convert": _Command("convert", "turn a data set into another format"),
    "print-config": _Command("print_config", "print a configuration and the origin of each value"),
    "eval-json": _Command("eval_json", "score a file of predictions"),
    "report": _Command("report", "make the HTML report of a run again, or compare two runs"),
    "prepare-coco": _Command("prepare_coco", "download and unpack COCO 2017"),
}


def main(argv: Sequence[str] | None = None, prog: str = "cascade-det") -> int:
    """Run a command; returns its exit status.

    Args:
        argv: a command and its arguments; ``None`` for those of the process.
        prog: what the user typed before them.
    """
    parser = command_parser(prog, __doc__)
    parser.epilog = "commands:\n" + "\n".join(
        f"  {name:<14}{command.summary}" for name, command in COMMANDS.items()
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="COMMAND --help lists them")
    args = parser.parse_args(argv)
    command = COMMANDS[args.command]
    module = importlib.import_module(f"cascade_det.commands.{command.module}")
    status: int = module.main([*command.flags, *args.arguments], f"{prog} {args.command}")
    return status

#!/usr/bin/env python3
"""Ours against Detectron2 and torchvision: same weights, same images, one process, runs in turn.

python tools/benchmark.py --quick                              # within two minutes
python tools/benchmark.py --batch 1 4 16 --proposals 1000 300 100
python tools/benchmark.py --device cuda --batch 1 8 --autocast float16
python tools/benchmark.py --survivors output/cells/results.json --rounds 5 MODEL.RESNETS.DEPTH 101
python tools/benchmark.py --config-file cells.yaml MODEL.WEIGHTS output/cells/model_final.pth

Without trained weights all detectors have the same drawn ones, and exits are replayed: as many
regions enter each stage as --survivors says, since thresholds on such weights would mean nothing.
With them, images come from DATASETS.TEST, and exits are those of the configuration. Every claim is
a ratio to a named peer in this run. --output gets benchmark.json, benchmark.md and benchmark.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cascade_det.benchmark.options import (
    CONTENDERS,
    MEASUREMENTS,
    QUICK,
    Options,
    read_survivors,
)
from cascade_det.commands.arguments import add_config_options, real, whole

LARGEST_SEED = 2**63 - 1  # of PyTorch
MOST_THREADS = 4096
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "Base-Cascade-RCNN-FPN.yaml"


def _options(args: argparse.Namespace) -> Options:
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(args).items()
        if value is not None
    }
    if not given.get("config_file"):
        given["config_file"] = (str(CONFIG),)
    if "survivors" in given:
        given["survivors"] = read_survivors(given["survivors"])
    defaults = QUICK if given.pop("quick") else {}
    if "contenders" in given:
        # Whoever asks for one of them by name has the time.
        given["emulated"] = True
    return Options(**{**defaults, **given})


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Options(())

    def add(name: str, what: str, **arguments: Any) -> None:
        parser.add_argument(name, help=what, **arguments)

    add("--config-file", "later ones on top", action="append", metavar="YAML")
    add("--output", f"folder of the results ({default.output})", type=Path, metavar="FOLDER")
    add("--quick", "few runs of a smaller image", action="store_true")
    add(
        "--contenders",
        "; ".join(f"{name}: {what}" for name, what in CONTENDERS.items()),
        nargs="+",
        metavar="NAME",
    )
    add("--measure", f"out of {', '.join(MEASUREMENTS)}", nargs="+", metavar="NAME")
    add("--batch", "images of a batch (1)", dest="batches", nargs="+", type=int, metavar="B")
    add(
        "--proposals",
        "regions of an image that reach the heads (1000 300 100)",
        nargs="+",
        type=int,
        metavar="N",
    )
    add("--size", "of drawn images (800 1088)", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"))
    add("--rounds", f"measured runs of each ({default.rounds})", type=int)
    add("--warmup", f"runs of each before ({default.warmup})", type=int)
    add("--seconds", "a comparison begins no round after so long (0: no limit)", type=real(0))
    add(
        "--survivors",
        "regions of an image that enter each stage of a trained model with exits, or the "
        "results.json of its evaluation (300 100 35)",
        nargs="+",
        metavar="COUNT",
    )
    add("--device", f"cpu, cuda or cuda:<index> ({default.device})")
    add("--threads", "of the CPU (as many as PyTorch takes)", type=whole(0, MOST_THREADS))
    add("--autocast", f"type of the peers under autocast ({default.autocast})", metavar="TYPE")
    add("--images", f"batches of the test set to go through ({default.images})", type=int)
    add("--seed", "of weights, images and regions (0)", type=whole(0, LARGEST_SEED))
    add_config_options(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    _parse(None)  # Help and errors do not wait for the imports below.

from cascade_det.benchmark.report import format_benchmark
from cascade_det.benchmark.run import run
from cascade_det.commands.errors import without_traceback
from cascade_det.engine.log import setup_logging


@without_traceback
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = _options(_parse(argv))
    options.check()
    setup_logging(str(options.output))
    print(format_benchmark(run(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

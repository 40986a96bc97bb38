r"""Time ours beside Detectron2 and torchvision: same images, in turn in one process.

cascade-det benchmark --quick                              # within two minutes
cascade-det benchmark --batch 1 4 16 --proposals 1000 300 100
cascade-det benchmark --device cuda --batch 1 8 --autocast float16
cascade-det benchmark --survivors output/cells/results.json --rounds 5 MODEL.RESNETS.DEPTH 101
cascade-det benchmark --config-file cells.yaml MODEL.WEIGHTS output/cells/model_final.pth
cascade-det benchmark --measure backbones                  # against ResNet-50-FPN
cascade-det benchmark --measure waits --batch 1 8          # what a GPU waits for, without one
cascade-det benchmark --config-file cascade_det://SemanticSegmentation/cascade_resnet50.yaml \
    --size 512 512 MODEL.WEIGHTS ''

Without trained weights all detectors share random ones. Thresholds on them would mean nothing, so
exits are replayed: each stage gets as many proposals as --survivors says. With trained weights,
images come from DATASETS.TEST and exits from the configuration. Every claim is a ratio to a named
baseline of the same run. --output gets benchmark.json, benchmark.md and benchmark.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cascade_det.benchmark.options import (
    AUTOCAST_TYPES,
    MEASUREMENTS,
    MODELS,
    QUICK,
    SEGMENTERS,
    Options,
    read_survivors,
)
from cascade_det.commands.arguments import config_parser, real, whole
from cascade_det.commands.errors import without_traceback

LARGEST_SEED = 2**63 - 1  # of PyTorch
MOST_THREADS = 4096


def _options(args: argparse.Namespace) -> Options:
    from cascade_det.model_zoo import get_config_file

    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(args).items()
        if value is not None
    }
    if not given.get("config_file"):
        given["config_file"] = (get_config_file("Base-Cascade-RCNN-FPN.yaml"),)
    if "survivors" in given:
        given["survivors"] = read_survivors(given["survivors"])
    defaults = QUICK if given.pop("quick") else {}
    if "contenders" in given:
        # Models that are named are measured even if they are slow.
        given["emulated"] = True
        named = given["contenders"]
        # "ours" may be either.
        given["segmenters"] = named if set(named) <= SEGMENTERS.keys() else ()
        given["contenders"] = named if set(named) <= MODELS.keys() else ()
    return Options(**{**defaults, **given})


def _parse(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    parser = config_parser(prog, __doc__, required=False)
    default = Options(())

    def add(name: str, what: str, **arguments: Any) -> None:
        parser.add_argument(name, help=what, **arguments)

    add("--output", f"folder of the results ({default.output})", type=Path, metavar="FOLDER")
    add("--quick", "a few runs on a smaller image", action="store_true")
    add(
        "--contenders",
        "; ".join(f"{name}: {what}" for name, what in MODELS.items())
        + "; of segmenters ours, ours-fast, ours-fast-exits and "
        + "; ".join(f"{name}: {what}" for name, what in SEGMENTERS.items() if name not in MODELS),
        choices=[*MODELS, *(name for name in SEGMENTERS if name not in MODELS)],
        nargs="+",
        metavar="NAME",
    )
    add(
        "--measure",
        "what to measure (all but tiles, attention, backbones and waits; of segmenters whole and "
        "parts)",
        choices=MEASUREMENTS,
        nargs="+",
    )
    add("--batch", "batch sizes (1)", dest="batches", nargs="+", type=whole(1), metavar="B")
    add("--proposals", "proposals per image (1000 300 100)", nargs="+", type=whole(1), metavar="N")
    add(
        "--size",
        "of random images in pixels (800 1088)",
        nargs=2,
        type=whole(32),
        metavar=("HEIGHT", "WIDTH"),
    )
    add("--rounds", f"measured runs of each model ({default.rounds})", type=whole(1))
    add("--warmup", f"unmeasured runs before them ({default.warmup})", type=whole(0))
    add("--seconds", "a comparison starts no new round after this time (0: no limit)", type=real(0))
    add(
        "--survivors",
        "proposals per image that enter each stage of a trained model with exits, or the "
        "results.json of its evaluation (300 100 35)",
        nargs="+",
        metavar="COUNT",
    )
    add("--device", f"cpu, cuda or cuda:<index> ({default.device})")
    add("--threads", "of the CPU (PyTorch's default)", type=whole(0, MOST_THREADS))
    add(
        "--autocast",
        f"dtype of the baselines under autocast ({default.autocast})",
        choices=AUTOCAST_TYPES,
    )
    add("--images", f"batches of the test set to use ({default.images})", type=whole(1))
    add("--seed", "of weights, images and proposals (0)", type=whole(0, LARGEST_SEED))
    return parser.parse_args(argv)


@without_traceback
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command; returns its exit status."""
    options = _options(_parse(argv, prog))
    from cascade_det.benchmark.report import format_benchmark
    from cascade_det.benchmark.run import run_benchmark
    from cascade_det.engine.log import setup_logging

    setup_logging()  # the folder is made once the options prove right
    print(format_benchmark(run_benchmark(options)))
    return 0

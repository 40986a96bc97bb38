"""The options of ``predict --engine``, and what runs then."""

from __future__ import annotations

import argparse
import functools
import sys
from typing import TYPE_CHECKING

from cascade_det.commands.arguments import real, whole
from cascade_det.errors import ConfigError
from cascade_det.text import printable

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode

    from cascade_det.offline.run import Engine, Summary

_PART_SIZE, _READERS = 256, 2
# By engine: the options that only it has. Both have the others.
_OWN = {"local": ("processes", "share"), "ray": ("actors", "num_cpus", "num_gpus")}
_SHARED = ("config_file", "input", "output", "opts")
_COMMON = ("part_size", "readers", "image_root", "merge")


def add_offline_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--engine`` and the options that need it."""
    group = parser.add_argument_group(
        "very many images (docs/offline.md)",
        "Rows of parquet files in --output instead of pictures. The same command continues a run "
        "that was stopped. --input also takes addresses (s3://...), COCO's json and parquet.",
    )
    group.add_argument("--engine", choices=tuple(_OWN), help="several processes here, or Ray")
    group.add_argument("--processes", type=whole(1), metavar="N", help="of --engine local (1)")
    group.add_argument(
        "--share", type=_share, metavar="K/N", help="do the K-th of N shares of the parts (1/1)"
    )
    group.add_argument(
        "--actors",
        type=whole(1),
        nargs=2,
        metavar=("MIN", "MAX"),
        help="of --engine ray, each with a detector (1 1)",
    )
    group.add_argument("--num-cpus", type=real(0), metavar="N", help="of an actor (1)")
    group.add_argument(
        "--num-gpus", type=real(0), metavar="N", help="of an actor, such as 0.5; 0 is the CPU (0)"
    )
    group.add_argument(
        "--part-size", type=whole(1), metavar="N", help=f"images of a part ({_PART_SIZE})"
    )
    group.add_argument(
        "--readers", type=whole(1), metavar="N", help=f"threads that read images ({_READERS})"
    )
    group.add_argument(
        "--image-root", metavar="FOLDER", help="of the names in json and parquet (theirs)"
    )
    group.add_argument(
        "--merge", action="store_true", default=None, help="then write predictions.json too"
    )


def _share(text: str) -> tuple[int, int]:
    first, _, second = text.partition("/")
    try:
        number, count = int(first), int(second)
    except ValueError:
        number = count = 0
    if not 1 <= number <= count:
        raise argparse.ArgumentTypeError(f"{text!r}: give K/N, such as 2/8, with K from 1 to N")
    return number, count


def check_offline_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a message if options contradict each other."""
    others = [name for engine, names in _OWN.items() if engine != args.engine for name in names]
    wrong = [n for n in others if getattr(args, n) is not None]
    if args.engine is None:
        wrong += [n for n in _COMMON if getattr(args, n) is not None]
    else:
        if "-" in args.input:
            parser.error("--input -: --engine reads no stdin. Give a list of images in parquet")
        own = {*_SHARED, "engine", *_COMMON, *(name for names in _OWN.values() for name in names)}
        for name, value in vars(args).items():
            # Not "in": a threshold of 0 equals False.
            if name not in own and value is not None and value is not False:
                option = "--" + name.replace("_", "-")
                parser.error(f"{option}: --engine detects with weights, and writes rows alone")
    for name in wrong:
        engine = next((engine for engine, names in _OWN.items() if name in names), None)
        option = "--" + name.replace("_", "-")
        parser.error(f"{option} is of --engine{f' {engine}' if engine else ''}")
    if args.actors is not None and args.actors[0] > args.actors[1]:
        parser.error("--actors: MIN is more than MAX")


def predict_offline(args: argparse.Namespace) -> int:
    """Run ``predict --engine``; returns its exit status, 1 if an image failed."""
    from cascade_det.config import check_config, is_segmenter, load_config
    from cascade_det.engine.log import setup_logging
    from cascade_det.offline.folder import OutputFolder
    from cascade_det.offline.images import list_images
    from cascade_det.offline.results import merge
    from cascade_det.offline.run import detect_in_parts

    setup_logging()
    cfg = load_config(args.config_file, args.opts)
    check_config(cfg)
    if is_segmenter(cfg):
        raise ConfigError("--engine is of detectors: a segmenter's label images are no rows")
    entries = list_images(args.input, args.image_root)
    cfg, engine = _engine(args, cfg)
    summary = detect_in_parts(
        cfg,
        entries,
        args.output,
        engine,
        part_size=args.part_size or _PART_SIZE,
        readers=args.readers or _READERS,
        share=args.share or (1, 1),
    )
    folder = OutputFolder(args.output)
    _print(summary, folder)
    failed = summary.failed + summary.failed_before
    if args.merge:
        address, failed = merge(folder)
        print(f"Merged: {printable(address)}")
    return int(failed > 0)


def _engine(args: argparse.Namespace, cfg: CfgNode) -> tuple[CfgNode, Engine]:
    from cascade_det.engine.devices import on_its_device
    from cascade_det.offline.local import run_local
    from cascade_det.offline.on_ray import Actors, run_on_ray

    if args.engine == "local":
        return on_its_device(cfg), functools.partial(run_local, processes=args.processes or 1)
    least, most = args.actors or (1, 1)
    cpus = 1.0 if args.num_cpus is None else args.num_cpus
    actors = Actors(least, most, cpus, args.num_gpus or 0.0)
    # The machine that starts the run may have another device than those of the actors.
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cuda" if actors.gpus else "cpu"
    return cfg, functools.partial(run_on_ray, actors=actors)


def _print(summary: Summary, folder: object) -> None:
    done = summary.parts - summary.missing
    print(
        f"{summary.images} images, {summary.detections} detections; {done} of {summary.parts} "
        f"parts are done, {summary.found_done} were before: {folder}"
    )
    for count, when in ((summary.failed, ""), (summary.failed_before, " before")):
        if count:
            print(f"{count} images failed{when}: see 'error' in their rows", file=sys.stderr)

r"""Detect objects in images and videos: annotated pictures, and a json in COCO's format.

cascade-det predict --config-file cells.yaml --input photo.jpg 'folder/*.png' --output out \
    --opts MODEL.WEIGHTS output/model_final.pth
cascade-det predict --onnx model.onnx --input folder clip.mp4 --output out  # from export

With the configuration of a segmenter: for each image a picture with the classes in colour, and a
label image, NAME.png, with the number of its class in every pixel.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cascade_det.commands.arguments import (
    add_config_file,
    add_config_options,
    command_parser,
    real,
    whole,
)
from cascade_det.commands.errors import without_traceback
from cascade_det.commands.offline import (
    add_offline_options,
    check_offline_options,
    predict_offline,
)
from cascade_det.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode

    from cascade_det.commands.prediction import Options
    from cascade_det.standalone import Predictor, SlicedPredictor, TilePredictor
    from cascade_det.streams.frames import Source

_SCORE_THRESHOLD = 0.5
_OVERLAP = 0.2  # of slices
_MERGES = ("nms", "wbf")
_TRACKERS = ("bytetrack", "sort")
_OF_DETECTIONS = (
    *("score_threshold", "classes", "max_detections", "slice"),
    *("save_crops", "txt", "csv", "tiles", "track"),
)


def _parse(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    parser = command_parser(prog, __doc__)
    detector = parser.add_mutually_exclusive_group(required=True)
    add_config_file(detector, required=False)
    detector.add_argument("--onnx", metavar="FILE", help="from export; replaces --config-file")
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        help="files of images or videos, folders, quoted globs, http(s):// of images or videos, "
        "rtsp://, video+http://, the number of a camera, or - for a list on stdin; a name that "
        "exists is a file",
    )
    parser.add_argument(
        "--output",
        required=True,
        help="folder for pictures, videos, label images and predictions.json",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="--input are folders: go on with images that appear there, until Ctrl-C or SIGTERM",
    )
    _add_slices(parser)
    _add_choice(parser)
    _add_files(parser)
    add_offline_options(parser)
    add_config_options(parser)
    args = parser.parse_args(argv)
    if args.onnx and args.opts:
        parser.error("--opts change a configuration, and --onnx uses none")
    _check_slices(parser, args)
    check_offline_options(parser, args)
    return args


def _add_slices(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("large images (of detectors)")
    group.add_argument(
        "--slice",
        type=whole(16),
        metavar="PIXELS",
        help="also detect in slices of this size, for small objects",
    )
    group.add_argument(
        "--overlap", type=real(0, 0.95), metavar="SHARE", help=f"of neighbours ({_OVERLAP})"
    )
    group.add_argument(
        "--slice-merge",
        choices=_MERGES,
        help=f"detections of slices: NMS or box fusion ({_MERGES[0]})",
    )


def _check_slices(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name, value in (("overlap", args.overlap), ("slice-merge", args.slice_merge)):
        if value is not None and args.slice is None:
            parser.error(f"--{name} is of slices: give --slice too")
    if args.slice is not None and args.onnx:
        parser.error("--slice needs a configuration: --onnx detects in whole images")
    if args.tiles and (args.onnx or args.slice is not None):
        other = "--onnx computes whole maps" if args.onnx else "with --slice an image has many maps"
        parser.error(f"--tiles needs the map of an image, of a tile gate: {other}")


def _add_choice(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("detections (segmenters have none)")
    group.add_argument(
        "--score-threshold",
        type=real(0, 1),
        help=f"of all but the json ({_SCORE_THRESHOLD})",
    )
    group.add_argument(
        "--classes", nargs="+", metavar="CLASS", help="only these: names, or numbers from 0"
    )
    group.add_argument(
        "--max-detections", type=whole(1), metavar="N", help="the best ones of each image"
    )


def _add_files(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("more output (of detections)")
    group.add_argument("--save-crops", action="store_true", help="crops/CLASS/NAME_0.jpg, ...")
    group.add_argument(
        "--txt", action="store_true", help="labels/NAME.txt: class, x, y, width, height, score"
    )
    group.add_argument("--csv", action="store_true", help="predictions.csv with all detections")
    group.add_argument(
        "--tiles",
        action="store_true",
        help="pictures show where a tile gate computed the finest map",
    )
    group.add_argument("--show", action="store_true", help="in a window too; Escape or q ends it")
    group.add_argument(
        "--track",
        nargs="?",
        const=_TRACKERS[0],
        choices=_TRACKERS,
        help=f"number the objects of videos ({_TRACKERS[0]})",
    )


@without_traceback
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command; returns its exit status.

    It is 1 if a file failed, and 128 plus the number of a signal that ended the run.
    """
    args = _parse(argv, prog)
    if args.engine:
        return predict_offline(args)
    from cascade_det.commands.display import check_display
    from cascade_det.commands.prediction import predict
    from cascade_det.onnx_predictor import OnnxPredictor

    if args.show:
        check_display()
    sources = _sources(args)
    output = Path(args.output)
    if args.onnx:
        # Without PyTorch, which may not be installed.
        predictor = OnnxPredictor(args.onnx)
        return predict(predictor, sources, output, _options(args, predictor.class_names))
    return _predict_with_weights(args, sources, output)


def _sources(args: argparse.Namespace) -> list[Source]:
    from cascade_det.commands.arguments import file_identity
    from cascade_det.streams.sources import find_sources, watch

    if not args.watch:
        return find_sources(args.input, map(os.fsdecode, sys.stdin.buffer))
    for folder in args.input:
        if file_identity(folder) == file_identity(args.output) is not None:
            raise DatasetError(
                f"--output {args.output}: is the folder that is watched, and pictures in it would "
                "be new images. Give another folder."
            )
    return [watch(args.input)]


def _predict_with_weights(args: argparse.Namespace, sources: list[Source], output: Path) -> int:
    from cascade_det.config import check_config, is_segmenter, load_config
    from cascade_det.engine.log import setup_logging

    setup_logging()
    cfg = load_config(args.config_file, args.opts)
    check_config(cfg)
    return (_segment if is_segmenter(cfg) else _detect)(cfg, args, sources, output)


def _segment(cfg: CfgNode, args: argparse.Namespace, sources: list[Source], output: Path) -> int:
    from cascade_det.commands.prediction import segment
    from cascade_det.standalone import SegmenterPredictor

    for name in _OF_DETECTIONS:
        value = getattr(args, name)
        # Not "in": a threshold of 0 equals False.
        if value is not None and value is not False:
            raise ConfigError(
                f"--{name.replace('_', '-')} is of detections, and a segmenter has none: every "
                "pixel gets the class with the best score. Leave it out."
            )
    return segment(SegmenterPredictor(cfg), sources, output, show=args.show)


def _detect(cfg: CfgNode, args: argparse.Namespace, sources: list[Source], output: Path) -> int:
    from cascade_det.commands.prediction import predict
    from cascade_det.config import exit_arguments
    from cascade_det.monitoring.monitor import METRICS_FILE
    from cascade_det.report.text import format_report
    from cascade_det.standalone import Predictor, SlicedPredictor, TilePredictor

    exits = exit_arguments(cfg)
    if args.tiles and not (exits and exits["tile_threshold"]):
        raise ConfigError(
            "--tiles shows what a tile gate computes, and here it is off: set "
            "MODEL.CASCADE.EXIT.TILE_THRESHOLD above 0 and MODEL.CASCADE.EXIT.ENABLED to True"
        )
    shadowed = cfg.CASCADE.SHADOW_SHARE > 0
    predictor = Predictor(cfg, metrics_dir=output if shadowed else None)
    used: Predictor | SlicedPredictor | TilePredictor = predictor
    if args.tiles:
        used = TilePredictor(predictor)
    if args.slice is not None:
        overlap = _OVERLAP if args.overlap is None else args.overlap
        merge = args.slice_merge or _MERGES[0]
        used = SlicedPredictor(predictor, size=args.slice, overlap=overlap, merge=merge)
    options = replace(
        _options(args, predictor.class_names),
        with_stages=exits is not None,
        others=[METRICS_FILE] if shadowed else [],
    )
    with predictor.monitor as monitor:
        status = predict(used, sources, output, options)
        if shadowed:
            print(format_report(monitor.report()))
    return status


def _options(args: argparse.Namespace, class_names: Sequence[str]) -> Options:
    from cascade_det.commands.prediction import Options
    from cascade_det.commands.prediction_outputs import Choice, MoreFiles, class_indices

    threshold = _SCORE_THRESHOLD if args.score_threshold is None else float(args.score_threshold)
    classes = None if args.classes is None else class_indices(args.classes, class_names)
    return Options(
        Choice(classes, args.max_detections, threshold),
        MoreFiles(crops=args.save_crops, texts=args.txt, csv=args.csv),
        track=args.track,
        show=args.show,
    )

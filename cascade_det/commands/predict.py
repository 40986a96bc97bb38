r"""Detect objects in images: annotated pictures and a COCO-format json with exit stages.

cascade-det predict --config-file cells.yaml --input photo.jpg 'folder/*.png' --output out \
    --opts MODEL.WEIGHTS output/model_final.pth
cascade-det predict --onnx model.onnx --input folder --output out   # from cascade-det export

With the configuration of a segmenter: for each image a picture with the classes in colour, and a
label image, NAME.png, with the number of its class in every pixel.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
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
from cascade_det.errors import ConfigError

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode

    from cascade_det.standalone import Predictor, SlicedPredictor

_SCORE_THRESHOLD = 0.5
_OVERLAP = 0.2  # of slices
_MERGES = ("nms", "wbf")


def _parse(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    parser = command_parser(prog, __doc__)
    detector = parser.add_mutually_exclusive_group(required=True)
    add_config_file(detector, required=False)
    detector.add_argument("--onnx", metavar="FILE", help="from export; replaces --config-file")
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        help="image files, folders or quoted globs; a name that exists is not a glob",
    )
    parser.add_argument(
        "--output", required=True, help="folder for pictures, label images and predictions.json"
    )
    parser.add_argument(
        "--score-threshold",
        type=real(0, 1),
        help=f"of drawn detections ({_SCORE_THRESHOLD}); segmenters have none",
    )
    _add_slices(parser)
    add_config_options(parser)
    args = parser.parse_args(argv)
    if args.onnx and args.opts:
        parser.error("--opts change a configuration, and --onnx uses none")
    _check_slices(parser, args)
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
        "--merge", choices=_MERGES, help=f"detections of slices: NMS or box fusion ({_MERGES[0]})"
    )


def _check_slices(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in ("overlap", "merge"):
        if getattr(args, name) is not None and args.slice is None:
            parser.error(f"--{name} is of slices: give --slice too")
    if args.slice is not None and args.onnx:
        parser.error("--slice needs a configuration: --onnx detects in whole images")


@without_traceback
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command; returns its exit status.

    It is 1 if a file failed, and 128 plus the number of a signal that ended the run.
    """
    args = _parse(argv, prog)
    from cascade_det.commands.prediction import find_images, predict
    from cascade_det.onnx_predictor import OnnxPredictor

    files = find_images(args.input)
    output = Path(args.output)
    if args.onnx:
        # Without PyTorch, which may not be installed.
        return predict(OnnxPredictor(args.onnx), files, output, _score_threshold(args))
    return _predict_with_weights(args, files, output)


def _predict_with_weights(args: argparse.Namespace, files: list[Path], output: Path) -> int:
    from cascade_det.config import check_config, is_segmenter, load_config
    from cascade_det.engine.log import setup_logging

    setup_logging()
    cfg = load_config(args.config_file, args.opts)
    check_config(cfg)
    return (_segment if is_segmenter(cfg) else _detect)(cfg, args, files, output)


def _segment(cfg: CfgNode, args: argparse.Namespace, files: list[Path], output: Path) -> int:
    from cascade_det.commands.prediction import segment
    from cascade_det.standalone import SegmenterPredictor

    if args.slice is not None:
        raise ConfigError("--slice is of detectors, and this is a segmenter. Leave it out.")
    if args.score_threshold is not None:
        raise ConfigError(
            "--score-threshold is of drawn detections, and a segmenter has none: every pixel gets "
            "the class with the best score. Leave it out."
        )
    return segment(SegmenterPredictor(cfg), files, output)


def _detect(cfg: CfgNode, args: argparse.Namespace, files: list[Path], output: Path) -> int:
    from cascade_det.commands.prediction import predict
    from cascade_det.config import exit_arguments
    from cascade_det.monitoring.monitor import METRICS_FILE
    from cascade_det.report.text import format_report
    from cascade_det.standalone import Predictor, SlicedPredictor

    shadowed = cfg.CASCADE.SHADOW_SHARE > 0
    predictor = Predictor(cfg, metrics_dir=output if shadowed else None)
    used: Predictor | SlicedPredictor = predictor
    if args.slice is not None:
        overlap = _OVERLAP if args.overlap is None else args.overlap
        merge = args.merge or _MERGES[0]
        used = SlicedPredictor(predictor, size=args.slice, overlap=overlap, merge=merge)
    with predictor.monitor as monitor:
        status = predict(
            used,
            files,
            output,
            _score_threshold(args),
            with_stages=exit_arguments(cfg) is not None,
            others=[METRICS_FILE] if shadowed else [],
        )
        if shadowed:
            print(format_report(monitor.report()))
    return status


def _score_threshold(args: argparse.Namespace) -> float:
    return _SCORE_THRESHOLD if args.score_threshold is None else float(args.score_threshold)

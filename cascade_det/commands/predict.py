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

from cascade_det.commands.arguments import add_config_file, add_config_options, command_parser, real
from cascade_det.commands.errors import without_traceback
from cascade_det.errors import ConfigError

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode

_SCORE_THRESHOLD = 0.5


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
    add_config_options(parser)
    args = parser.parse_args(argv)
    if args.onnx and args.opts:
        parser.error("--opts change a configuration, and --onnx uses none")
    return args


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
    from cascade_det.standalone import Predictor

    shadowed = cfg.CASCADE.SHADOW_SHARE > 0
    predictor = Predictor(cfg, metrics_dir=output if shadowed else None)
    with predictor.monitor as monitor:
        status = predict(
            predictor,
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

r"""Find thresholds of early exits for a target, on images with ground truth.

cascade-det calibrate --config-file cells.yaml --output output/exits --max-ap-drop 0.1 \
  MODEL.WEIGHTS output/cells/model_final.pth
cascade-det calibrate --config-file ... --output ... --latency-ms 40
cascade-det calibrate --config-file ... --output ... --exit-rate 0.6
cascade-det calibrate --config-file ... --output ... --risk 0.02 --delta 0.1
With masks: --max-ap-drop 0.1 --metric segm/AP, or --risk 0.02 --loss masks
Segmenters: --max-drop 0.5 [--metric sem_seg/Dice], or any other target

Records one run of the full cascade over DATASETS.TEST and tries one path of settings on the record,
from safe to risky. Changes of AP are cross-fitted: of images that had no part in the choice. With
many images, a free search tries settings on one half of them, and the other half judges. Use images
that neither the detector nor its gates were trained on, or the results promise too much.

--output gets exits.yaml, to use on top of the configuration (--config-file cells.yaml
--config-file output/exits/exits.yaml); quality.yaml, balanced.yaml and fast.yaml, three more
points of the Pareto front, where they hold what they promise; front.csv and front.png;
comparison.csv, with each exit alone and with simpler alternatives; for a model with masks,
masks.csv, with fewer masks; calibration.json, with what to expect; and report.html, with all of
that. The whole folder is replaced at the end, and may hold no other files. Of a segmenter it gets
exits.yaml, comparison.csv and comparison.png, with smaller decoders, smaller images and an oracle,
trials.csv, calibration.json and report.html.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cascade_det.commands.arguments import check_output_file, config_parser
from cascade_det.commands.errors import without_traceback
from cascade_det.hosts import HOSTS, choose_host, load_host

if TYPE_CHECKING:
    from cascade_det.calibration.target import Target

logger = logging.getLogger(__name__)


def _parse(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    parser = config_parser(prog, __doc__)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="replaced as a whole")
    parser.add_argument(
        "--host",
        default="auto",
        choices=HOSTS,
        help="auto (the default): Detectron2 where it can be imported",
    )
    group = parser.add_argument_group("target, one of")
    target = group.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--max-ap-drop",
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="least work within this loss of AP, or of the --metric",
    )
    target.add_argument(
        "--latency-ms", type=float, metavar="MS", help="highest AP within this time per image"
    )
    target.add_argument(
        "--exit-rate",
        type=float,
        metavar="SHARE",
        help="highest AP that skips this share of the later stages' proposals",
    )
    target.add_argument(
        "--risk",
        type=float,
        metavar="SHARE",
        help="least work that loses at most this share of the full cascade's true positives, with "
        "probability 1 - delta",
    )
    parser.add_argument(
        "--metric",
        choices=("bbox/AP", "segm/AP", "sem_seg/mIoU", "sem_seg/Dice"),
        help="the metric of these targets (bbox/AP; of segmenters sem_seg/mIoU)",
    )
    parser.add_argument(
        "--loss",
        choices=("boxes", "masks"),
        default="boxes",
        help="a true positive of --risk is lost if no box, or no mask, of its class overlaps its "
        "object at IoU 0.5 any more (%(default)s)",
    )
    parser.add_argument("--delta", type=float, default=0.1, help="see --risk (%(default)s)")
    parser.add_argument(
        "--score-threshold",
        type=float,
        metavar="SCORE",
        help="least score of the true positives of --risk, and of the promised agreement (0.5); "
        "segmenters have none",
    )
    parser.add_argument(
        "--images", type=int, default=2000, help="most images to record (%(default)s)"
    )
    parser.add_argument(
        "--trials",
        type=int,
        default=1000,
        help="most settings that a free search tries (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of folds and halves (%(default)s)")
    return parser.parse_args(argv)


@without_traceback
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parse(argv, prog)
    from cascade_det.calibration.calibrate import calibrate
    from cascade_det.calibration.maps.calibrate import calibrate_maps
    from cascade_det.calibration.target import Options
    from cascade_det.config import is_segmenter
    from cascade_det.engine.log import setup_logging
    from cascade_det.errors import ConfigError

    target = _target(args)
    score = 0.5 if args.score_threshold is None else args.score_threshold
    options = Options(images=args.images, trials=args.trials, score=score, seed=args.seed)
    output = Path(args.output)
    _check_output(output, args.config_file)
    setup_logging(output)
    name, why = choose_host(args.host)
    logger.info("Host: %s, %s", name, why)
    host = load_host(name)
    cfg = host.load_config(args.config_file, args.opts)
    host.check_config(cfg)
    if is_segmenter(cfg):
        if args.score_threshold is not None:
            raise ConfigError("--score-threshold is for detectors: leave it out")
        target = replace(target, metric=args.metric or "sem_seg/mIoU")
        calibrate_maps(cfg, lambda: host.open_segmenter(cfg), target, output, options)
    else:
        calibrate(cfg, lambda: host.open_detector(cfg), target, output, options)
    return 0


def _target(args: argparse.Namespace) -> Target:
    from cascade_det.calibration.target import Target

    return Target(
        args.max_ap_drop,
        args.latency_ms,
        args.exit_rate,
        args.risk,
        args.delta,
        args.metric or "bbox/AP",
        args.loss,
    )


def _check_output(output: Path, config_files: Sequence[str]) -> None:
    # Before setup_logging, which writes to the folder.
    from cascade_det.calibration.calibrate import LOG_FILE
    from cascade_det.calibration.maps.report import MAP_FILES
    from cascade_det.calibration.report import FILES
    from cascade_det.files import check_replaceable

    check_replaceable(output, (*FILES, *MAP_FILES, LOG_FILE))
    for name in {*FILES, *MAP_FILES}:
        check_output_file(output / name, config_files)

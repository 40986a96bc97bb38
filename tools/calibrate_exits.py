#!/usr/bin/env python3
"""Find thresholds of early exits for a target, on images with ground truth.

python tools/calibrate_exits.py --config-file cells.yaml --output output/exits --max-ap-drop 0.1 \\
  MODEL.WEIGHTS output/cells/model_final.pth
python tools/calibrate_exits.py --config-file ... --output ... --latency-ms 40
python tools/calibrate_exits.py --config-file ... --output ... --exit-rate 0.6
python tools/calibrate_exits.py --config-file ... --output ... --risk 0.02 --delta 0.1

The full cascade runs once over DATASETS.TEST and is recorded; settings are tried on the record. One
half of the images chooses, everything that is reported comes from the other half. Out come, in
--output: exits.yaml, to be put on top of the configuration (--config-file cells.yaml --config-file
output/exits/exits.yaml); quality.yaml, balanced.yaml and fast.yaml, three more points of the front,
as far as they keep what they promise; front.csv and front.png; comparison.csv, with each exit alone
and what is simpler than exits; and calibration.json, with what is to be expected. The folder is for
these alone: it is replaced as a whole at the end.

Images that the detector was trained on, or that its gates were, would promise too much.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from cascade_det.commands.arguments import add_config_options, check_output_file
from cascade_det.hosts import HOSTS


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--config-file", required=True, action="append", metavar="YAML", help="later ones on top"
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="FOLDER",
        help="is replaced as a whole",
    )
    parser.add_argument(
        "--host", default="auto", choices=HOSTS, help="auto: Detectron2 where it can be imported"
    )
    group = parser.add_argument_group("target, one of")
    target = group.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--max-ap-drop", type=float, metavar="POINTS", help="the least work for this much AP"
    )
    target.add_argument(
        "--latency-ms", type=float, metavar="MS", help="the highest AP within this time per image"
    )
    target.add_argument(
        "--exit-rate",
        type=float,
        metavar="SHARE",
        help="the highest AP with this share of the later stages' regions not computed",
    )
    target.add_argument(
        "--risk",
        type=float,
        metavar="SHARE",
        help="the least work that loses no more of the full cascade's true positives, with a "
        "probability of 1 - delta",
    )
    parser.add_argument("--delta", type=float, default=0.1, help="see --risk")
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="true positives of --risk, and of the promised agreement, have at least this score",
    )
    parser.add_argument("--images", type=int, default=2000, help="the most to record")
    parser.add_argument("--trials", type=int, default=1000, help="the most settings to try")
    parser.add_argument("--seed", type=int, default=0, help="of the split in halves")
    add_config_options(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    _parse(None)  # Help and errors do not wait for the imports below.

from cascade_det.calibration.calibrate import MADE, calibrate
from cascade_det.calibration.report import FILES
from cascade_det.calibration.target import Options, Target
from cascade_det.commands.errors import without_traceback
from cascade_det.engine.log import setup_logging
from cascade_det.files import check_replaceable
from cascade_det.hosts import choose_host, load_host

logger = logging.getLogger("cascade_det.tools.calibrate_exits")


@without_traceback
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parse(argv)
    target = Target(args.max_ap_drop, args.latency_ms, args.exit_rate, args.risk, args.delta)
    options = Options(
        images=args.images, trials=args.trials, score=args.score_threshold, seed=args.seed
    )
    _check_output(Path(args.output), args.config_file)
    setup_logging(args.output)
    name, why = choose_host(args.host)
    logger.info("Host: %s, %s", name, why)
    host = load_host(name)
    cfg = host.load_config(args.config_file, args.opts)
    host.check_config(cfg)
    calibrate(cfg, lambda: host.open_detector(cfg), target, Path(args.output), options)
    return 0


def _check_output(output: Path, config_files: Sequence[str]) -> None:
    """Before the first line of the log: the folder may hold no other files."""
    check_replaceable(output, MADE)
    for name in FILES:
        check_output_file(output / name, config_files)


if __name__ == "__main__":
    sys.exit(main())

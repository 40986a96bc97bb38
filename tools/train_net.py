#!/usr/bin/env python3
"""Train or evaluate a cascade from a YAML configuration.

python tools/train_net.py --config-file configs/quick_schedules/demo.yaml [KEY VALUE ...]
python tools/train_net.py --config-file ... --resume
python tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from cascade_det.config import check_config, load_config
from cascade_det.engine.log import setup_logging
from cascade_det.errors import CascadeDetError, ConfigError
from cascade_det.files import atomic_path
from cascade_det.standalone import evaluate, train

logger = logging.getLogger("cascade_det.tools.train_net")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parse(argv)
    setup_logging()
    try:
        if args.num_gpus > 1:
            raise ConfigError("--num-gpus: only one process is supported so far")
        cfg = load_config(args.config_file, args.opts)
        check_config(cfg)
        setup_logging(cfg.OUTPUT_DIR)
        with atomic_path(Path(cfg.OUTPUT_DIR) / "config.yaml") as temporary:
            temporary.write_text(cfg.dump())
        if args.eval_only:
            evaluate(cfg, resume=args.resume)
        else:
            train(cfg, resume=args.resume)
    except (CascadeDetError, FloatingPointError) as error:
        # A traceback would hide what the user can mend.
        logger.error("%s", error)
        return 1
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train or evaluate a cascade.", formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="YAML")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on this machine")
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="configuration keys that override the file, such as SOLVER.MAX_ITER 1000",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

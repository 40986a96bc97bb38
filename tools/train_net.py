#!/usr/bin/env python3
"""Train or evaluate a cascade from a YAML configuration.

python tools/train_net.py --config-file configs/quick_schedules/demo.yaml [KEY VALUE ...]
python tools/train_net.py --config-file ... --resume
python tools/train_net.py --config-file ... --config-file configs/exits/cloud.yaml
python tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
python tools/train_net.py --config-file ... --replay-batch output/diverged_0000123_rank0.pth
python tools/train_net.py --config-file ... --num-gpus 8

With several processes, --num-gpus of them run on each machine: one on each GPU, or all on the CPU
where MODEL.DEVICE is cpu. Under torchrun its own options say how many there are:

torchrun --nproc-per-node 8 tools/train_net.py --config-file ...

--host says who runs it: Detectron2 with our heads in it, or the standalone host; where it is not
given, Detectron2 if it can be imported.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from cascade_det.commands.arguments import add_config_options
from cascade_det.hosts import HOSTS


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train or evaluate a cascade.", formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--config-file", required=True, action="append", metavar="YAML", help="later ones on top"
    )
    parser.add_argument(
        "--host",
        default="auto",
        choices=HOSTS,
        help="who builds and trains the model; auto: Detectron2 where it can be imported",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS")
    parser.add_argument(
        "--replay-batch",
        metavar="FILE",
        help="run the batch of a training that diverged again, and say what breaks first",
    )
    parser.add_argument(
        "--num-gpus", type=int, default=1, metavar="N", help="processes on each machine"
    )
    parser.add_argument("--num-machines", type=int, default=1, metavar="N")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="I", help="from 0")
    parser.add_argument(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="tcp://host:port, an address of machine 0 with a free port; needed for several\n"
        "machines only",
    )
    add_config_options(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    _parse(None)  # Help and errors do not wait for the imports below.

from fvcore.common.config import CfgNode

from cascade_det.config import check_processes, scale_to_world_size
from cascade_det.engine.log import setup_logging
from cascade_det.engine.run_lock import check_free
from cascade_det.errors import CascadeDetError
from cascade_det.hosts import choose_host, load_host
from cascade_det.parallel import distributed
from cascade_det.parallel.interrupts import Interrupted
from cascade_det.parallel.processes import INTERRUPTED

logger = logging.getLogger("cascade_det.tools.train_net")

# What a user can mend about files. The traceback of any other OSError tells more.
_FILE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parse(argv)
    setup_logging()
    try:
        with _file_errors_told():
            return _launch(args)
    except (CascadeDetError, FloatingPointError) as error:
        # A traceback would hide what the user can mend.
        logger.error("%s", error)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def _launch(args: argparse.Namespace) -> int:
    args.host, why = choose_host(args.host)
    host = load_host(args.host)
    cfg = host.load_config(args.config_file, args.opts)
    host.check_config(cfg)
    first = args.machine_rank == 0 and os.environ.get("RANK", "0") == "0"
    if not args.replay_batch:
        if first:
            check_free(cfg.OUTPUT_DIR)
        setup_logging(cfg.OUTPUT_DIR if first else None)
    if first:
        logger.info("Host: %s, %s", args.host, why)
    if args.replay_batch:
        print("\n".join(host.replay_batch(cfg, args.replay_batch)))
        return 0
    cfg = _for_processes(cfg, host, args)
    return distributed.launch(
        run,
        (cfg, args),
        num_processes=args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        device_type=cfg.MODEL.DEVICE.partition(":")[0],
    )


def run(cfg: CfgNode, args: argparse.Namespace) -> int:
    """The work of one process, among others or alone; returns its exit status."""
    setup_logging(cfg.OUTPUT_DIR)
    host = load_host(args.host)
    host.join()
    try:
        with _file_errors_told():
            if args.eval_only:
                host.evaluate(cfg, resume=args.resume)
            else:
                host.train(cfg, resume=args.resume)
    except Interrupted as end:
        if distributed.is_main():
            logger.warning("%s. To go on: %s", end, _resuming_command())
        return INTERRUPTED
    return 0


@contextmanager
def _file_errors_told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FILE_ERRORS:
            raise
        raise CascadeDetError(f"{error.filename or 'A file'}: {error.strerror}") from error


def _for_processes(cfg: CfgNode, host: ModuleType, args: argparse.Namespace) -> CfgNode:
    processes = distributed.planned_world_size(args.num_gpus, args.num_machines)
    check_processes(cfg, processes, train=not args.eval_only)
    if not args.eval_only:
        cfg = scale_to_world_size(cfg, processes)
        host.check_config(cfg)
    return cfg


def _resuming_command() -> str:
    if distributed.under_torchrun():
        return "the same torchrun command with --resume"
    given = [argument for argument in sys.argv[1:] if argument != "--resume"]
    return shlex.join(["python", sys.argv[0], "--resume", *given])


if __name__ == "__main__":
    sys.exit(main())

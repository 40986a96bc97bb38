"""Train or evaluate a cascade from a YAML configuration.

cascade-det train --config-file cells.yaml [KEY VALUE ...]
cascade-det train --config-file ... --resume
cascade-det train --config-file ... --auto-resume
cascade-det train --config-file ... --config-file cascade_det://exits/cloud.yaml
cascade-det train --config-file ... --replay-batch output/diverged_0000123_rank0.pth
cascade-det train --config-file ... --num-gpus 8
cascade-det eval --config-file ... MODEL.WEIGHTS output/model_final.pth

--num-gpus starts that many processes on each machine: one per GPU, or all on the CPU where
MODEL.DEVICE is cpu. Under torchrun, torchrun's options set their number:

torchrun --nproc-per-node 8 -m cascade_det train --config-file ...
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

from cascade_det.commands.arguments import config_parser
from cascade_det.errors import CascadeDetError
from cascade_det.hosts import HOSTS, choose_host, load_host
from cascade_det.parallel.signals import INTERRUPTED

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode

logger = logging.getLogger(__name__)

# Errors about files that a user can fix. Any other OSError keeps its traceback.
_FILE_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
}


def _parse(argv: Sequence[str] | None, prog: str | None = None) -> argparse.Namespace:
    parser = config_parser(prog, __doc__)
    parser.add_argument(
        "--host",
        default="auto",
        choices=HOSTS,
        help="builds and trains the model; auto: Detectron2 where it can be imported",
    )
    resuming = parser.add_mutually_exclusive_group()
    resuming.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR"
    )
    resuming.add_argument(
        "--auto-resume",
        action="store_true",
        help="the same if there is one, else start: for jobs that a scheduler starts again",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS")
    parser.add_argument(
        "--replay-batch",
        metavar="FILE",
        help="rerun the batch on which a training diverged, and report what breaks first",
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
        help="with several machines: tcp://host:port, an address of machine 0 and a free port",
    )
    args = parser.parse_args(argv)
    if args.auto_resume and args.eval_only:
        parser.error("--auto-resume is for a training; --resume evaluates the last checkpoint")
    return args


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parse(argv, prog)
    program = prog.split() if prog else ["python", sys.argv[0]]
    words = sys.argv[1:] if argv is None else argv
    given = [word for word in words if word not in ("--resume", "--auto-resume")]
    args.resuming_command = shlex.join([*program, "--resume", *given])
    from cascade_det.engine.log import setup_logging

    setup_logging()
    try:
        with _file_errors_without_traceback():
            return _launch(args)
    except (CascadeDetError, FloatingPointError) as error:
        logger.error("%s", error)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def _launch(args: argparse.Namespace) -> int:
    from cascade_det.engine.log import setup_logging
    from cascade_det.engine.run_lock import check_free
    from cascade_det.parallel import distributed

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
        run_process,
        (cfg, args),
        num_processes=args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        device_type=cfg.MODEL.DEVICE.partition(":")[0],
    )


def run_process(cfg: CfgNode, args: argparse.Namespace) -> int:
    """Train or evaluate in one process, the only one or one of several; returns the exit status."""
    from cascade_det.engine.log import setup_logging
    from cascade_det.engine.restarts import continues
    from cascade_det.parallel import distributed
    from cascade_det.parallel.interrupts import Interrupted

    setup_logging(cfg.OUTPUT_DIR)
    host = load_host(args.host)
    host.join()
    try:
        with _file_errors_without_traceback():
            if args.eval_only:
                host.evaluate(cfg, resume=args.resume)
            else:
                resume = args.resume or continues(cfg.OUTPUT_DIR, auto=args.auto_resume)
                host.train(cfg, resume=resume)
    except Interrupted as end:
        if distributed.is_main():
            command = args.resuming_command
            if distributed.under_torchrun():
                command = "the same torchrun command with --resume"
            logger.warning("%s. To continue: %s", end, command)
        return INTERRUPTED
    return 0


@contextmanager
def _file_errors_without_traceback() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FILE_ERRORS:
            raise
        raise CascadeDetError(f"{error.filename or 'A file'}: {error.strerror}") from error


def _for_processes(cfg: CfgNode, host: ModuleType, args: argparse.Namespace) -> CfgNode:
    from cascade_det.config import check_processes, scale_to_world_size
    from cascade_det.parallel import distributed

    processes = distributed.planned_world_size(args.num_gpus, args.num_machines)
    check_processes(cfg, processes, train=not args.eval_only)
    if not args.eval_only:
        cfg = scale_to_world_size(cfg, processes)
        host.check_config(cfg)
    return cfg

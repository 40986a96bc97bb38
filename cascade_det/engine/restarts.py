"""Runs that are started again by torchrun or a scheduler, and go on where they were."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

from cascade_det.engine.checkpoint import newest_checkpoint
from cascade_det.files import atomic_path
from cascade_det.parallel import distributed

logger = logging.getLogger(__name__)

_JOB_FILE = ".cascade_det.torchrun"


def continues(output_dir: str | Path, *, auto: bool) -> bool:
    """Whether a run that was not told to resume goes on with the one in its folder.

    It does where there is a checkpoint, if ``auto``, or if the same torchrun has started that run
    and now starts it again. Without the second condition, torchrun's retry of a run that refused
    the folder of another training would go on with that training.

    Args:
        output_dir: ``OUTPUT_DIR``.
        auto: whether the user asked for it.

    Returns:
        The same on every process.

    Raises:
        CheckpointError: ``last_checkpoint`` holds no name of a file beside it.
    """

    def checkpoint() -> str:
        if not auto and not _is_own_restart(Path(output_dir)):
            return ""
        return newest_checkpoint(output_dir)

    found = distributed.on_main(checkpoint)
    if found:
        logger.info("%s: going on from %s", "--auto-resume" if auto else "torchrun", found)
    elif auto:
        logger.info("--auto-resume: no checkpoint in %s, so this is a start", output_dir)
    return bool(found)


def record_job(output_dir: str | Path) -> None:
    """Note that this torchrun, if it is one, has started the run in the folder."""
    if distributed.under_torchrun():
        with atomic_path(Path(output_dir) / _JOB_FILE) as temporary:
            temporary.write_text(_job())


def _is_own_restart(folder: Path) -> bool:
    if not distributed.under_torchrun() or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) < 1:
        return False
    try:
        return (folder / _JOB_FILE).read_text() == _job()
    except OSError:
        return False


def _job() -> str:
    """Its id alone would not do: torchrun's default is the same for all."""
    agent = f"{socket.gethostname()}:{os.getppid()}"
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')} {agent}"

"""One run at a time in an output folder."""

from __future__ import annotations

import datetime
import errno
import functools
import json
import logging
import os
import shlex
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from filelock import FileLock, Timeout
from fvcore.common.config import CfgNode

from cascade_det.errors import ConfigError
from cascade_det.files import write_json
from cascade_det.parallel import distributed
from cascade_det.text import printable

logger = logging.getLogger(__name__)

_LOCK = ".cascade_det.lock"
_OWNER = ".cascade_det.owner.json"
# Seconds. With older versions of filelock the workers of a killed run hold its lock for 5 more
# seconds, until they notice.
_PATIENCE = 10.0
# Raised by file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def alone_in_output_dir(
    run: Callable[Concatenate[CfgNode, _Arguments], _Result],
) -> Callable[Concatenate[CfgNode, _Arguments], _Result]:
    """Lock ``OUTPUT_DIR`` while the decorated function of a configuration runs.

    Of several processes the main one holds the lock for all. It is released when the process ends,
    even if that is killed.

    Raises:
        ConfigError: another run holds it; the message names its process.
    """

    @functools.wraps(run)
    def locked(cfg: CfgNode, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        folder = Path(cfg.OUTPUT_DIR)
        locks: list[FileLock] = []

        def take() -> None:
            locks.append(_acquire(folder))
            write_json(_this_process(), folder / _OWNER)

        distributed.on_main(take)
        try:
            return run(cfg, *args, **kwargs)
        finally:
            for lock in locks:
                (folder / _OWNER).unlink(missing_ok=True)
                lock.release()

    return locked


def check_free(output_dir: str | Path) -> None:
    """Check that no run holds a folder, before anything is written to it.

    Raises:
        ConfigError: one does; the message names its process.
    """
    if (Path(output_dir) / _LOCK).exists():
        _acquire(Path(output_dir)).release()


def _acquire(folder: Path) -> FileLock:
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        raise ConfigError(
            f"OUTPUT_DIR {folder} is in use by another run: {_owner_of(folder)}. Wait for its end "
            "or stop it, or give this run another OUTPUT_DIR."
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        logger.warning(
            "%s: its file system has no locks (%s), so another run in this folder would go "
            "unnoticed",
            folder,
            error,
        )
    return lock


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
    }


def _owner_of(folder: Path) -> str:
    try:
        owner = json.loads((folder / _OWNER).read_text())
        text = "process {pid} on {host} since {since} ({command})".format_map(owner)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return "its process is unknown"
    return printable(text, longest=500)

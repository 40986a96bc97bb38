"""Log lines to the console and to ``log.txt``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from tqdm import tqdm

from cascade_det.engine.writers import progress_logger
from cascade_det.errors import ConfigError
from cascade_det.parallel import distributed
from cascade_det.text import printable

_LOGGERS = ("cascade_det", "fvcore", "detectron2")
_handlers: list[logging.Handler] = []  # of the last setup_logging()


def setup_logging(output_dir: str | Path | None = None) -> None:
    """Log to the console and, if a folder is given, append to its ``log.txt``.

    A later call replaces the handlers of an earlier one. Processes besides the main one log to
    ``log.txt.rank1`` and so on, and only their warnings reach the console.

    Args:
        output_dir: made if needed; ``None`` for the console alone.

    Raises:
        ConfigError: no log can be written to ``output_dir``.
    """
    rank = distributed.rank()
    console = _ConsoleHandler()
    handlers: list[logging.Handler] = [console]
    if rank > 0:
        console.setLevel(logging.WARNING)
    if output_dir is not None:
        handlers.append(_open(Path(output_dir), rank))
    process = "" if rank == 0 else f" rank {rank}"
    line = f"[%(asctime)s{process} %(name)s] %(levelname)s: %(message)s"
    for handler in handlers:
        handler.setFormatter(_Printable(line, "%m/%d %H:%M:%S"))
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        for old in _handlers:
            logger.removeHandler(old)
        for handler in handlers:
            logger.addHandler(handler)
    for old in _handlers:
        old.close()
    _handlers[:] = handlers


def _open(folder: Path, rank: int) -> logging.FileHandler:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        name = "log.txt" if rank == 0 else f"log.txt.rank{rank}"
        return logging.FileHandler(folder / name, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"OUTPUT_DIR is {str(folder)!r}, but {error.filename}: {error.strerror}. Give a folder "
            "that can be made and written to."
        ) from error


class _Printable(logging.Formatter):
    """Escapes characters in file and class names that a terminal or an encoder rejects."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)


class _ConsoleHandler(logging.Handler):
    """Prints above a progress bar, and drops progress lines while a bar is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == progress_logger.name and sys.stderr.isatty():
            return
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except Exception:
            self.handleError(record)

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


def setup_logging(output_dir: str | Path | None = None, *, level: int = logging.INFO) -> None:
    """Log to the console and, where a folder is given, append to its ``log.txt``.

    May be called again: the handlers of the last call are replaced. Of several processes, those
    beside the main one log to ``log.txt.rank1`` and so on, and show warnings only.

    Args:
        output_dir: made if needed; ``None`` for the console alone.
        level: of the least important lines that are shown.

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
    who = "" if rank == 0 else f" rank {rank}"
    line = f"[%(asctime)s{who} %(name)s] %(levelname)s: %(message)s"
    for handler in handlers:
        handler.setFormatter(_Printable(line, "%m/%d %H:%M:%S"))
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(level)
        for old in [h for h in logger.handlers if isinstance(h, (_ConsoleHandler, _LogFile))]:
            logger.removeHandler(old)
            old.close()
        for handler in handlers:
            logger.addHandler(handler)


def _open(folder: Path, rank: int) -> _LogFile:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        name = "log.txt" if rank == 0 else f"log.txt.rank{rank}"
        return _LogFile(folder / name, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"OUTPUT_DIR is {str(folder)!r}, but {error.filename}: {error.strerror}. Give a folder "
            "that can be made and written to."
        ) from error


class _Printable(logging.Formatter):
    """Escapes what names of files and classes could do to a terminal, or to an encoder."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)


class _LogFile(logging.FileHandler):
    """``log.txt``; a class of its own to be known again."""


class _ConsoleHandler(logging.Handler):
    """Prints above a progress bar, if one is drawn, which then replaces the lines of progress."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == progress_logger.name and sys.stderr.isatty():
            return
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except Exception:
            self.handleError(record)

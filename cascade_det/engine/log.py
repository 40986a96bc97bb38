"""Log lines to the console and to ``log.txt``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from tqdm import tqdm

from cascade_det.engine.writers import progress_logger

_LOGGERS = ("cascade_det", "fvcore")


def setup_logging(output_dir: str | Path | None = None, *, level: int = logging.INFO) -> None:
    """Log to the console and, where a folder is given, append to its ``log.txt``.

    May be called again: the handlers of the last call are replaced.

    Args:
        output_dir: made if needed; ``None`` for the console alone.
        level: of the least important lines that are shown.
    """
    handlers: list[logging.Handler] = [_ConsoleHandler()]
    if output_dir is not None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        handlers.append(_LogFile(folder / "log.txt", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(
            logging.Formatter("[%(asctime)s %(name)s] %(levelname)s: %(message)s", "%m/%d %H:%M:%S")
        )
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(level)
        for old in [h for h in logger.handlers if isinstance(h, (_ConsoleHandler, _LogFile))]:
            logger.removeHandler(old)
            old.close()
        for handler in handlers:
            logger.addHandler(handler)


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

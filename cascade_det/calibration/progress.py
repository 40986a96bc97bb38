"""The progress of a long task: a bar on a terminal, else a log line every few seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

logger = logging.getLogger(__name__)

# Between two log lines.
SECONDS = 15.0


@contextmanager
def progress_bar(
    task: str, total: int, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[..., None]]:
    """Show progress; gives a function that counts one finished step, or several.

    Args:
        task: a verb with its object: "Recording images".
        total: the largest number of steps.
        clock: returns seconds.
    """
    done, logged = 0, clock()
    with tqdm(total=total, desc=task, disable=None, leave=False) as bar:

        def step(count: int = 1) -> None:
            nonlocal done, logged
            done += count
            bar.update(count)
            # A bar that is not shown is disabled.
            if bar.disable and clock() - logged >= SECONDS:
                logged = clock()
                logger.info("%s: %d of %d", task, done, total)

        yield step

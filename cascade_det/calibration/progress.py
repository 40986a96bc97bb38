"""The progress of a long task: a bar on a terminal, else a log line every few seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from tqdm import tqdm

logger = logging.getLogger(__name__)

# Between two log lines.
SECONDS = 15.0


class Progress:
    """A context manager that shows progress.

    Args:
        what: the task, as a verb with its object: "Recording images".
        total: the largest number of steps.
        clock: returns seconds.
    """

    def __init__(
        self, what: str, total: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what = what
        self._total = total
        self._clock = clock
        self._done = 0
        self._logged = clock()
        self._bar = tqdm(total=total, desc=what, disable=None, leave=False)

    def __enter__(self) -> Progress:
        return self

    def step(self, count: int = 1) -> None:
        """Count finished steps."""
        self._done += count
        self._bar.update(count)
        # A bar that is not shown is disabled.
        if self._bar.disable and self._clock() - self._logged >= SECONDS:
            self._logged = self._clock()
            logger.info("%s: %d of %d", self._what, self._done, self._total)

    def __exit__(self, *_: object) -> None:
        self._bar.close()

"""How far a long work is: a bar on a terminal, elsewhere a line in the log from time to time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from tqdm import tqdm

logger = logging.getLogger(__name__)

# Between two lines: often enough to see that it goes on, seldom enough to find other lines.
SECONDS = 15.0


class Progress:
    """A context that is told of each step.

    Args:
        what: is done, as a verb with its object: "Recording images".
        total: the most steps that it takes.
        clock: gives seconds.
    """

    def __init__(
        self, what: str, total: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what = what
        self._total = total
        self._clock = clock
        self._done = 0
        self._told = clock()
        self._bar = tqdm(total=total, desc=what, disable=None, leave=False)

    def __enter__(self) -> Progress:
        return self

    def step(self, count: int = 1) -> None:
        """So many more steps are done."""
        self._done += count
        self._bar.update(count)
        # A bar that is not shown is disabled.
        if self._bar.disable and self._clock() - self._told >= SECONDS:
            self._told = self._clock()
            logger.info("%s: %d of %d", self._what, self._done, self._total)

    def __exit__(self, *_: object) -> None:
        self._bar.close()

"""Times of parts of a model that has no timer: from one marked call to the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from cascade_det.benchmark.timing import synchronize

# What a function belongs to, its name there, and the part that its call begins.
Mark = tuple[Any, str, str | Callable[..., str]]


class Marks:
    """Milliseconds of parts; each ends where the next begins.

    Args:
        device: a GPU is waited for at every mark.
        clock: gives seconds.
    """

    def __init__(
        self, device: torch.device | str = "cpu", clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.milliseconds: dict[str, float] = {}
        self._device = torch.device(device)
        self._clock = clock
        self._part: str | None = None
        self._since = 0.0

    def begin(self, part: str | None) -> None:
        """Let ``part`` begin, and the one before end; ``None`` only ends."""
        synchronize(self._device)
        now = self._clock()
        if self._part is not None:
            elapsed = (now - self._since) * 1000
            self.milliseconds[self._part] = self.milliseconds.get(self._part, 0.0) + elapsed
        self._part, self._since = part, now

    @contextmanager
    def watching(self, marks: Sequence[Mark]) -> Iterator[None]:
        """Within the block a call of a marked function begins its part, and runs as before.

        Args:
            marks: owner, name of the function in it, and the part; a function of the call's
                arguments where parts differ.
        """
        with ExitStack() as stack:
            for owner, name, part in marks:
                watched = self._watched(getattr(owner, name), part)
                stack.enter_context(mock.patch.object(owner, name, watched))
            yield
            self.begin(None)

    def _watched(
        self, function: Callable[..., Any], part: str | Callable[..., str]
    ) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.begin(part if isinstance(part, str) else part(*args, **kwargs))
            return function(*args, **kwargs)

        return run

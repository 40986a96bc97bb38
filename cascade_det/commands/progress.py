"""How far a run of ``predict`` is: images per second, the time of its parts, and exit rates."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

from cascade_det.streams.pipeline import PartTimes

_PERIOD = 1.0  # seconds between two looks at the rates


class Progress:
    """A line on the terminal, where there is one; a context manager.

    Args:
        total: frames to come; ``None`` if unknown.
        times: of the parts.
        exits: returns the metrics of ``ExitEvaluator`` so far; ``None`` without exits.
    """

    def __init__(
        self,
        total: int | None,
        times: PartTimes,
        exits: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        self._times, self._exits = times, exits
        self._start = self._shown = time.monotonic()
        self._bar = tqdm(total=total, disable=None, unit="img")
        self._count = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self) -> None:
        """Another frame is done."""
        self._count += 1
        now = time.monotonic()
        if not self._bar.disable and now - self._shown >= _PERIOD:
            self._shown = now
            self._bar.set_postfix_str(self._parts(), refresh=False)
        self._bar.update()

    @property
    def summary(self) -> str:
        """In words: ``12.3 images/s; ms per image: read 3.1, detect 70.2, ...; left ...``."""
        seconds = time.monotonic() - self._start
        return f"{self._count / max(seconds, 1e-9):.3g} images/s; {self._parts()}"

    def _parts(self) -> str:
        parts = self._times.milliseconds(self._count).items()
        times = ", ".join(f"{name} {x:.1f}" for name, x in parts)
        return f"ms per image: {times or 'none'}{self._rates()}"

    def _rates(self) -> str:
        if self._exits is None:
            return ""
        metrics = self._exits()["exits"]
        tiles = metrics.get("tiles")
        rates = [f"{1 - tiles['computed_share']:.0%} of the tiles"] if tiles else []
        rates += [f"{metrics['proposals']['exit_rate']:.0%} before stage 0"]
        stages = sum(name.startswith("stage") and name[5:].isdecimal() for name in metrics)
        rates += [f"{metrics[f'stage{i}']['exit_rate']:.0%} after {i}" for i in range(stages - 1)]
        return f"; exits: {', '.join(rates)}"

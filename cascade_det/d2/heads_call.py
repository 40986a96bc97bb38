"""Arguments and results of our heads that Detectron2's interface has no place for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from detectron2.structures import Instances

from cascade_det.core import CascadeStats, PartTimer


@dataclass
class HeadsCall:
    """One inference by the heads.

    Attributes:
        timer: measures the milliseconds of the stages.
        started: reading of the time budget's clock when work on the images began; ``None`` to
            start it when the proposals arrive.
        whole_maps: compute whole maps, whatever the exits say.
        stats: how many regions entered and left each stage; set by the heads.
        masked: the detections that the cascade gave masks; set by the heads.
    """

    timer: PartTimer | None = None
    started: float | None = None
    whole_maps: bool = False
    stats: CascadeStats | None = None
    masked: list[Instances] | None = None

    @contextmanager
    def within(self) -> Iterator[HeadsCall]:
        """Make this the current call of the thread inside the block."""
        token = _current.set(self)
        try:
            yield self
        finally:
            _current.reset(token)


_current: ContextVar[HeadsCall | None] = ContextVar("heads_call", default=None)


def current_call() -> HeadsCall:
    """The innermost ``HeadsCall.within`` of this thread; outside of any, a new one."""
    return _current.get() or HeadsCall()

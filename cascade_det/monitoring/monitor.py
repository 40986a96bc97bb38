"""Exits in production: counters, shadow runs and drift while a detector is in use."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import RLock
from typing import Any

from cascade_det.core.structures import DetectorOutput, PartTimer
from cascade_det.data.samples import Sample
from cascade_det.engine.detector import Detector
from cascade_det.engine.hooks import scalars_of
from cascade_det.evaluation import ExitEvaluator, RegionFlops, agreement_loss
from cascade_det.files import naming
from cascade_det.monitoring.shadow import ShadowRules, image_key, shadow_metrics, watch_drift

METRICS_FILE = "metrics.json"


class ExitMonitor:
    """Detects with a detector, and monitors its exits.

    The images that ``shadow`` chooses also take the full cascade in the same call. If exits lose
    more on them than calibration promised, that is drift: a warning in the log, a call of
    ``on_drift``, and ``shadow/drift`` in the report. Drift is tested after every shadow image. If
    the promise is true, the probability of any false alarm until the window is first full is at
    most ``(1 - confidence) / 2``, with the confidence of ``shadow``.

    Threads may share a monitor if they may share its detector: calls detect at the same time, and
    are counted one after another, in the order in which they end.

    Args:
        detector: of either host, with ``detect(batch, stages=, timer=)``.
        shadow: which images take the full cascade, and the promise.
        flops: of one region, see ``cascade_det.engine.head_flops.region_flops``.
        window: number of latest shadow images that count; at least 1.
        on_drift: called with ``report()`` when drift begins, in the thread whose call showed the
            drift, after that call is counted.
        output_dir: a line with all metrics goes to its ``metrics.json`` after every ``period``
            images, when drift begins or ends, and in ``close()``; ``None`` for no file.
        period: images between two lines, at least 1.

    Attributes:
        images: counted since the beginning or the last ``reset()``.
        drifted: whether there is drift.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        shadow: ShadowRules | None = None,
        flops: RegionFlops | None = None,
        window: int = 1000,
        on_drift: Callable[[Mapping[str, Any]], None] | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        period: int = 1000,
    ) -> None:
        if window < 1 or period < 1:
            raise ValueError(f"window and period are at least 1, not {window} and {period}")
        self.detector = detector
        self._shadow = shadow or ShadowRules()
        self._exits = ExitEvaluator(flops)
        self._losses: deque[float] = deque(maxlen=window)
        self._on_drift = on_drift
        self._begun: list[Mapping[str, Any]] = []
        self._path = None if output_dir is None else Path(output_dir, METRICS_FILE)
        self._period = period
        self._numbered = self._seen = self._written = 0
        self._lock = RLock()
        self.images = 0
        self.drifted = False

    def detect(
        self,
        batch: Sequence[Sample],
        *,
        stages: bool | Sequence[bool] = False,
        timer: PartTimer | None = None,
    ) -> DetectorOutput:
        """Call the detector with the same arguments, and count the output.

        An image is identified by ``image_id``, else by ``file_name``, else by its number.

        Raises:
            ValueError: the detector gives no stages for a shadow run.
        """
        with self._lock:
            first, self._numbered = self._numbered, self._numbered + len(batch)
        keys = [image_key(sample, first + index) for index, sample in enumerate(batch)]
        chosen = [self._shadow.chooses(key) for key in keys]
        asked = [stages] * len(batch) if isinstance(stages, bool) else list(stages)
        wanted = [a or b for a, b in zip(asked, chosen, strict=True)]
        output = self.detector.detect(
            batch, stages=stages if wanted == asked else wanted, timer=timer
        )
        with self._lock:
            self._count(batch, output, chosen)
            begun, self._begun = self._begun, []
        # Outside the lock: a callback may wait for another thread that uses this monitor.
        if self._on_drift is not None:
            for report in begun:
                self._on_drift(report)
        if not any(asked):
            output.stages = None
        return output

    def report(self) -> dict[str, Any]:
        """``exits``, see ``ExitEvaluator``, and ``shadow``, see ``shadow_metrics``.

        The intervals hold for any number of reports until the window is full, and for a single
        report afterwards, since the window then starts at another image each time.
        """
        with self._lock:
            return {
                **self._exits.evaluate(),
                "shadow": shadow_metrics(list(self._losses), self._shadow),
            }

    def reset(self) -> None:
        """Reset counters, the window and the alarm; the file stays."""
        with self._lock:
            self._exits.reset()
            self._losses.clear()
            self.images = 0
            self.drifted = False

    def close(self) -> None:
        """Write the last line."""
        with self._lock:
            if self._seen > self._written:
                self._write(self.report())

    def __getstate__(self) -> dict[str, Any]:
        """For a copy or another process: everything except the lock, which cannot be copied."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=RLock())

    def __enter__(self) -> ExitMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _count(
        self, batch: Sequence[Sample], output: DetectorOutput, chosen: Sequence[bool]
    ) -> None:
        self._exits.process(batch, output)
        self.images += len(batch)
        self._seen += len(batch)
        changed = False
        if any(chosen):
            if not output.stages:
                raise ValueError("the detector gives no stages: it can have no shadow runs")
            full = output.stages[-1].detections
            for is_chosen, early, late in zip(chosen, output.detections, full, strict=True):
                if is_chosen:
                    loss = agreement_loss(early, late, min_score=self._shadow.min_score)
                    self._losses.append(loss)
                    changed |= self._look()
        if changed or self._seen - self._written >= self._period:
            self._write(self.report())

    def _look(self) -> bool:
        """Whether drift began or ended with the last image."""
        before, report = self.drifted, self.report()
        self.drifted = watch_drift(report["shadow"], before)
        if self.drifted and not before:
            self._begun.append(report)
        return self.drifted != before

    def _write(self, report: Mapping[str, Any]) -> None:
        self._written = self._seen
        if self._path is None:
            return
        # Json has no NaN.
        row = {name: x if math.isfinite(x) else None for name, x in scalars_of(report)}
        line = json.dumps({**row, "iteration": self._seen}, sort_keys=True)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
            file.flush()
            os.fsync(file.fileno())

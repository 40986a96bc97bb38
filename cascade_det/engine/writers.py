"""Writes the metrics of a training: metrics.json, TensorBoard, progress bar and log lines."""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cascade_det.engine.history import History
from cascade_det.engine.loop import Metrics
from cascade_det.files import atomic_path, naming

logger = logging.getLogger(__name__)
# Lines of progress: always in log.txt, on the console only if no bar can be drawn.
progress_logger = logging.getLogger("cascade_det.engine.progress")


class Writer:
    """Base of the writers; writes nothing."""

    def __init__(self) -> None:
        self._written = -1
        self._seen: dict[str, int] = {}

    def resume(self, written: int) -> None:
        """Called at the start: continue after iteration ``written``, and drop later values."""
        self._written = written

    def step(self, history: History) -> None:
        """Called after every iteration."""

    def write(self, history: History) -> None:
        """Called periodically and at the end."""

    def close(self) -> None:
        """Called once, after errors too."""

    def _new_scalars(self, history: Metrics) -> dict[int, dict[str, float]]:
        """New values since the last call: iteration, ascending, to name to smoothed value."""
        rows: dict[int, dict[str, float]] = defaultdict(dict)
        for name in history:
            iteration = history.latest(name)[1]
            # The previous run has written what a resume restored.
            if iteration > self._seen.get(name, self._written):
                self._seen[name] = iteration
                rows[iteration][name] = history.smoothed(name)
        return dict(sorted(rows.items()))


class JsonWriter(Writer):
    """Appends one json object per line, like Detectron2's ``metrics.json``.

    Values that are not finite become ``null``: json has no NaN.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch()

    def resume(self, written: int) -> None:
        """Drop the lines of later iterations, and an incomplete one."""
        super().resume(written)
        lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _iteration_of(line) <= written]
        with atomic_path(self._path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def write(self, history: History) -> None:
        """Append one line for each iteration with new values."""
        lines = []
        for iteration, scalars in self._new_scalars(history).items():
            row: dict[str, Any] = {
                name: value if math.isfinite(value) else None for name, value in scalars.items()
            }
            lines.append(json.dumps({**row, "iteration": iteration}, sort_keys=True))
        with naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())


class TensorBoardWriter(Writer):
    """Event files in ``log_dir``; without the package, only a log line that says so."""

    def __init__(self, log_dir: str | Path) -> None:
        super().__init__()
        self._log_dir = str(log_dir)
        self._writer: Any = None

    def resume(self, written: int) -> None:
        """Start an event file that replaces later values of earlier ones."""
        super().resume(written)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            logger.info("No TensorBoard files: tensorboard is missing (pip install tensorboard).")
        else:
            self._writer = SummaryWriter(self._log_dir, purge_step=written + 1)

    def write(self, history: History) -> None:
        """Add new values."""
        if self._writer is None:
            return
        for iteration, scalars in self._new_scalars(history).items():
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


class ConsoleWriter(Writer):
    """A progress bar on a terminal, and log lines with losses, times and the time left."""

    def __init__(self, max_iter: int) -> None:
        super().__init__()
        self._max_iter = max_iter
        self._bar: tqdm[Any] | None = None

    def step(self, history: History) -> None:
        """Advance the bar."""
        if self._bar is None:
            # disable=None: no bar where the output is not a terminal.
            self._bar = tqdm(
                total=self._max_iter, initial=history.iteration, disable=None, unit="it"
            )
        if "total_loss" in history:
            self._bar.set_postfix(loss=f"{history.median('total_loss'):.4g}", refresh=False)
        self._bar.update()

    def write(self, history: History) -> None:
        """Log one line, unless this iteration has been logged."""
        iteration = history.latest("total_loss")[1] if "total_loss" in history else -1
        if iteration > self._written:
            self._written = iteration
            progress_logger.info("%s", _progress_line(history, iteration))

    def close(self) -> None:
        """Close the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def _iteration_of(line: str) -> float:
    """The iteration of a line of ``metrics.json``; infinite if it has none."""
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def _progress_line(history: History, iteration: int) -> str:
    fields = {}
    if "eta_seconds" in history:
        seconds = int(history.latest("eta_seconds")[0])
        fields["eta"] = str(datetime.timedelta(seconds=seconds))
    fields["iter"] = str(iteration)
    for name in history:
        if "loss" in name:
            fields[name] = f"{history.median(name):.4g}"
    for name in ("time", "data_time"):
        if name in history:
            fields[name] = f"{history.mean(name):.4f}"
    if "lr" in history:
        fields["lr"] = f"{history.latest('lr')[0]:.5g}"
    if torch.cuda.is_initialized():
        fields["max_mem"] = f"{torch.cuda.max_memory_allocated() / 2**20:.0f}M"
    return "  ".join(f"{name}: {value}" for name, value in fields.items())

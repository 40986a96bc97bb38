"""Weights & Biases, MLflow and Trackio as writers of a training, in either host.

Servers, projects and offline modes are those of each tool's own environment variables.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.engine.hooks import FINAL, Hook, scalars_of
from cascade_det.engine.loop import Metrics, TrainingLoop
from cascade_det.engine.writers import Writer
from cascade_det.errors import ConfigError
from cascade_det.files import write_json
from cascade_det.parallel import distributed

logger = logging.getLogger(__name__)

# Which run of each tool a folder belongs to.
RUNS_FILE = "loggers.json"
_PROJECT = "cascade_det"
_PICTURES = ("report.png", "analysis/*.png", "analysis/worst_images/*.jpg")
_MODELS = ("model_best", FINAL)


class Logger(Writer, ABC):
    """A run in an experiment tracker; the methods of subclasses may raise any error.

    Attributes:
        package: to import.
    """

    package = ""

    @abstractmethod
    def start(self, values: Mapping[str, Any], folder: Path, run: str | None) -> str:
        """Start a run, or continue one.

        Args:
            values: the configuration by full keys.
            folder: ``OUTPUT_DIR``; its last part names the run.
            run: what an earlier start returned; ``None`` starts a new run.

        Returns:
            What identifies the run.
        """

    @abstractmethod
    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Log finite scalars of an iteration; iterations ascend."""

    @abstractmethod
    def evaluation(
        self, iteration: int, rows: Sequence[tuple[str, float]], pictures: Mapping[str, Path]
    ) -> None:
        """Log an evaluation: its metrics as a table, and pictures by name."""

    @abstractmethod
    def model(self, file: Path) -> None:
        """Log where a file of weights is; it is not uploaded."""

    @abstractmethod
    def end(self, *, finished: bool) -> None:
        """End the run; ``finished`` is false if it was stopped or failed."""

    def write(self, history: Metrics) -> None:
        """Log new values; those that are not finite are left out."""
        for iteration, values in self._new_scalars(history).items():
            self.scalars(iteration, {k: v for k, v in values.items() if math.isfinite(v)})


class WandbLogger(Logger):
    """Weights & Biases. It ignores values of iterations before its last one."""

    package = "wandb"

    def start(self, values: Mapping[str, Any], folder: Path, run: str | None) -> str:
        """See :meth:`Logger.start`."""
        self._wandb = _imported(self.package)
        run = run or secrets.token_hex(4)
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=os.environ.get("WANDB_NAME", folder.name),
            dir=str(folder),
            id=run,
            resume="allow",
        )
        self._run.config.update(dict(values), allow_val_change=True)
        return run

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """See :meth:`Logger.scalars`."""
        self._run.log(dict(values), step=iteration)

    def evaluation(
        self, iteration: int, rows: Sequence[tuple[str, float]], pictures: Mapping[str, Path]
    ) -> None:
        """See :meth:`Logger.evaluation`."""
        table = self._wandb.Table(columns=["metric", "value"], data=[list(row) for row in rows])
        images = {name: self._wandb.Image(str(path)) for name, path in pictures.items()}
        self._run.log({"evaluation": table, **images}, step=iteration)

    def model(self, file: Path) -> None:
        """See :meth:`Logger.model`."""
        artifact = self._wandb.Artifact(f"{self._run.id}-{file.stem}", "model")
        artifact.add_reference(file.resolve().as_uri())
        self._run.log_artifact(artifact)

    def end(self, *, finished: bool) -> None:
        """See :meth:`Logger.end`."""
        self._run.finish(exit_code=0 if finished else 1)


class MlflowLogger(Logger):
    """MLflow. Parameters are those of a run's first start, ``config.yaml`` is of the last one."""

    package = "mlflow"

    def start(self, values: Mapping[str, Any], folder: Path, run: str | None) -> str:
        """See :meth:`Logger.start`."""
        self._mlflow = _imported(self.package)
        if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
            self._mlflow.set_experiment(_PROJECT)
        found = self._mlflow.start_run(run_id=run, run_name=None if run else folder.name)
        if run is None:
            # Longer ones are refused; config.yaml has all of them.
            self._mlflow.log_params({key: str(value)[:6000] for key, value in values.items()})
        self._mlflow.log_artifact(str(folder / "config.yaml"))
        return str(found.info.run_id)

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """See :meth:`Logger.scalars`."""
        # Other characters, which names of classes may have, are refused.
        named = {re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII): v for name, v in values.items()}
        self._mlflow.log_metrics(named, step=iteration)

    def evaluation(
        self, iteration: int, rows: Sequence[tuple[str, float]], pictures: Mapping[str, Path]
    ) -> None:
        """See :meth:`Logger.evaluation`; the last one replaces those before."""
        table = {"iteration": iteration, **dict(rows)}
        self._mlflow.log_dict(table, "evaluation/evaluation.json")
        for name, path in pictures.items():
            self._mlflow.log_artifact(str(path), str(Path("evaluation", name).parent))

    def model(self, file: Path) -> None:
        """See :meth:`Logger.model`."""
        self._mlflow.set_tag(file.stem, file.resolve().as_uri())

    def end(self, *, finished: bool) -> None:
        """See :meth:`Logger.end`."""
        self._mlflow.end_run("FINISHED" if finished else "FAILED")


class TrackioLogger(Logger):
    """Trackio, in its local database unless its environment variables name a server."""

    package = "trackio"

    def start(self, values: Mapping[str, Any], folder: Path, run: str | None) -> str:
        """See :meth:`Logger.start`."""
        self._trackio = _imported(self.package)
        run = run or f"{folder.name}-{secrets.token_hex(4)}"
        self._run = self._trackio.init(
            project=_PROJECT, name=run, resume="allow", config=dict(values), embed=False
        )
        return run

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """See :meth:`Logger.scalars`."""
        # "time" is a column of its database.
        named = {"iteration_time" if k == "time" else k: value for k, value in values.items()}
        self._run.log(named, step=iteration)

    def evaluation(
        self, iteration: int, rows: Sequence[tuple[str, float]], pictures: Mapping[str, Path]
    ) -> None:
        """See :meth:`Logger.evaluation`."""
        table = self._trackio.Table(columns=["metric", "value"], data=[list(row) for row in rows])
        images = {name: self._trackio.Image(path) for name, path in pictures.items()}
        self._run.log({"evaluation": table, **images}, step=iteration)

    def model(self, file: Path) -> None:
        """See :meth:`Logger.model`."""
        artifact = self._trackio.Artifact(f"{self._run.name}-{file.stem}", "model")
        artifact.add_reference(file.resolve().as_uri())
        self._run.log_artifact(artifact)

    def end(self, *, finished: bool) -> None:
        """See :meth:`Logger.end`; Trackio keeps no status."""
        self._run.finish()


LOGGERS: dict[str, type[Logger]] = {
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
    "trackio": TrackioLogger,
}


class LoggerHook(Hook):
    """Feeds loggers: scalars, each evaluation, and at the end where the weights are.

    Put it last. A logger that fails later than at its start is left out from then on, with a
    warning: the training matters more.

    Args:
        loggers: by name.
        values: the configuration by full keys.
        folder: ``OUTPUT_DIR``, where the runs are kept for a resumed training.
        period: iterations between two writes.
    """

    def __init__(
        self, loggers: Mapping[str, Logger], values: Mapping[str, Any], folder: Path, period: int
    ) -> None:
        self._loggers = loggers
        self._values = values
        self._folder = folder
        self._period = period
        self._running: dict[str, Logger] = {}
        self._evaluated: Mapping[str, Any] = {}

    def before_train(self, trainer: TrainingLoop) -> None:
        """Start or continue the runs.

        Raises:
            ConfigError: one cannot start.
        """
        # An evaluation that was made up for belongs to an iteration that was written.
        written = trainer.start_iter - (2 if trainer.results else 1)
        file = self._folder / RUNS_FILE
        runs = json.loads(file.read_text()) if file.exists() else {}
        for name, log in self._loggers.items():
            try:
                runs[name] = log.start(self._values, self._folder, runs.get(name))
            except ConfigError:
                raise
            except Exception as error:
                raise ConfigError(
                    f"CASCADE.LOGGERS: {name} cannot start ({type(error).__name__}: {error}). "
                    "Correct its settings, or take it out of the list."
                ) from error
            self._running[name] = log
            log.resume(written)
            write_json(runs, file)
        self._write(trainer)

    def after_step(self, trainer: TrainingLoop) -> None:
        """Write at the end of a period, and after an evaluation."""
        done = trainer.iteration + 1
        if done % self._period == 0 or trainer.results is not self._evaluated:
            self._write(trainer)

    def after_train(self, trainer: TrainingLoop) -> None:
        """Write what is left, and end the runs."""
        self._write(trainer)
        if trainer.finished:
            self._each(self._log_models)
        self._each(lambda log: log.end(finished=trainer.finished))
        self._running = {}

    def _write(self, trainer: TrainingLoop) -> None:
        self._each(lambda log: log.write(trainer.history))
        results = trainer.results
        if results is not self._evaluated and results:
            rows, pictures = list(scalars_of(results)), _pictures(self._folder, results)
            self._each(lambda log: log.evaluation(trainer.iteration, rows, pictures))
        self._evaluated = results

    def _log_models(self, log: Logger) -> None:
        for name in _MODELS:
            if (file := self._folder / f"{name}.pth").exists():
                log.model(file)

    def _each(self, call: Callable[[Logger], None]) -> None:
        for name, log in list(self._running.items()):
            try:
                call(log)
            except Exception as error:
                del self._running[name]
                logger.warning(
                    "CASCADE.LOGGERS: %s failed, and gets nothing more of this training: %s: %s",
                    name,
                    type(error).__name__,
                    error,
                )


def logger_hooks(cfg: CfgNode) -> list[Hook]:
    """The hook of ``CASCADE.LOGGERS``; none without loggers, or in another than the main process.

    Args:
        cfg: the checked configuration of a training.
    """
    if not cfg.CASCADE.LOGGERS or not distributed.is_main():
        return []
    loggers = {name: LOGGERS[name]() for name in cfg.CASCADE.LOGGERS}
    folder = Path(cfg.OUTPUT_DIR).resolve()
    return [LoggerHook(loggers, config.flat(cfg), folder, cfg.CASCADE.LOG_PERIOD)]


def check_installed(names: Collection[str]) -> None:
    """Check that the packages of loggers are installed, without importing them.

    Raises:
        ConfigError: one is missing.
    """
    for name in names:
        if importlib.util.find_spec(LOGGERS[name].package) is None:
            raise _missing(name)


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise _missing(package) from error


def _missing(name: str) -> ConfigError:
    return ConfigError(
        f"CASCADE.LOGGERS names {name!r}, which is not installed: pip install "
        f"'cascade_det[{name}]', or take it out of the list."
    )


def _pictures(folder: Path, results: Mapping[str, Any]) -> dict[str, Path]:
    """Pictures of the last evaluation; of several test sets, names begin with that of the set."""
    folders = [folder, *(folder / name for name in results)]
    files = [file for one in folders for pattern in _PICTURES for file in sorted(one.glob(pattern))]
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}

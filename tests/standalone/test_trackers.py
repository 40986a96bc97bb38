"""What experiment trackers hold after a run and its continuation, read from their own files."""

import json
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shape_runs import INSTANT, metrics_of

from cascade_det.config import flat, load_config
from cascade_det.standalone.train import train


def plot(_results, path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)


@pytest.fixture(autouse=True)
def _small_pictures(no_pictures, monkeypatch):
    """A chart of four pixels, which an evaluation draws at once."""
    monkeypatch.setattr("cascade_det.engine.evaluate.plot_report", plot)


class Mlflow:
    """A store in SQLite, which keeps run and artifacts apart."""

    def __init__(self, folder, monkeypatch):
        self.mlflow = pytest.importorskip("mlflow")
        pytest.importorskip("sqlalchemy")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        for name in ("NAME", "ID"):
            monkeypatch.delenv(f"MLFLOW_EXPERIMENT_{name}", raising=False)
        monkeypatch.chdir(folder)
        self.mlflow.set_tracking_uri(None)

    def read(self):
        client = self.mlflow.MlflowClient()
        experiment = client.get_experiment_by_name("cascade_det")
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.info.status == "FINISHED"
        history = client.get_metric_history(run.info.run_id, "total_loss")
        artifacts = Path(run.info.artifact_uri)
        return {
            "losses": [(point.step, point.value) for point in history],
            "config": run.data.params,
            "table": json.loads((artifacts / "evaluation" / "evaluation.json").read_text()),
            "pictures": {path.stem for path in (artifacts / "evaluation").glob("*.png")},
            "models": {run.data.tags["model_final"]},
        }


class Wandb:
    """An offline run as it is sent later: records of protobuf in blocks of LevelDB."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")

    def records(self, path):
        from wandb.proto.wandb_internal_pb2 import Record

        data, position, parts = path.read_bytes(), 7, b""
        while position + 7 <= len(data):
            if (left := 32768 - position % 32768) < 7:
                position += left
                continue
            _, length, kind = struct.unpack_from("<IHB", data, position)
            if position + 7 + length > len(data):
                return  # still being written
            parts += data[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # whole, or the last of several parts
                yield Record.FromString(parts)
                parts = b""

    def written(self, path):
        """The records of a run; its end is written by another process."""
        for _ in range(600):
            records = list(self.records(path))
            if records and records[-1].HasField("exit"):
                return records
            time.sleep(0.1)
        raise AssertionError(f"{path} has no end after a minute")

    def read(self):
        files = sorted(self.folder.glob("output/wandb/offline-run-*/run-*.wandb"))
        assert len({file.name for file in files}) == 1  # one run, continued
        records = [record for file in files for record in self.written(file)]
        rows, settings, models = [], {}, set()
        for record in records:
            updates = [*record.run.config.update, *record.config.update]
            settings |= {item.key: json.loads(item.value_json) for item in updates}
            rows.append({_key(i): json.loads(i.value_json) for i in record.history.item})
            models |= {entry.ref for entry in record.artifact.manifest.contents}
        media = [path for file in files for path in file.parent.glob("files/media/*/*")]
        (table,) = (json.loads(p.read_text()) for p in media if p.name.endswith(".table.json"))
        return {
            "losses": [(row["_step"], row["total_loss"]) for row in rows if "total_loss" in row],
            "config": settings,
            "table": dict(table["data"]),
            "pictures": {path.name.split("_")[0] for path in media if path.suffix == ".png"},
            "models": models,
        }


def _key(item):
    return item.key or "/".join(item.nested_key)


class Trackio:
    """Its local database."""

    def __init__(self, folder, monkeypatch):
        storage = pytest.importorskip("trackio.sqlite_storage")
        self.storage = storage.SQLiteStorage
        for module in ("trackio", "trackio.utils", "trackio.sqlite_storage"):
            monkeypatch.setattr(f"{module}.TRACKIO_DIR", folder / "trackio", raising=False)

    def read(self):
        (run,) = self.storage.get_runs("cascade_det")
        rows = self.storage.get_logs("cascade_det", run)
        (evaluated,) = (row for row in rows if "evaluation" in row)
        table = evaluated["evaluation"]["_value"]
        return {
            "losses": [(row["step"], row["total_loss"]) for row in rows if "total_loss" in row],
            "config": self.storage.get_run_config("cascade_det", run),
            "table": {row["metric"]: row["value"] for row in table},
            "pictures": {"report"} & evaluated.keys(),
            "models": {entry["name"] for entry in self.storage.list_artifacts("cascade_det")},
        }


TRACKERS = {"mlflow": Mlflow, "wandb": Wandb, "trackio": Trackio}


@pytest.mark.parametrize("name", TRACKERS)
def test_one_run_holds_all_of_a_training_and_its_continuation(options, tmp_path, monkeypatch, name):
    tracker = TRACKERS[name](tmp_path, monkeypatch)
    keys = ["OUTPUT_DIR", str(tmp_path / "output"), "SOLVER.STEPS", "()"]
    # So long that the first block of W&B's file ends in the configuration.
    keys += ["CASCADE.SEMANTIC_CLASSES", str(("x" * 20_000,))]
    keys = [*options, *keys, "CASCADE.LOGGERS", f"('{name}',)", "SOLVER.MAX_ITER"]
    train(load_config(INSTANT, [*keys, "2", "DATASETS.TEST", "()"]))
    cfg = load_config(INSTANT, [*keys, "4"])
    results = train(cfg, resume=True)
    found = tracker.read()
    lines = [line for line in metrics_of(cfg.OUTPUT_DIR) if "total_loss" in line]
    assert found["losses"] == [(line["iteration"], line["total_loss"]) for line in lines]
    assert [step for step, _ in found["losses"]] == [0, 1, 2, 3]
    assert found["config"].keys() >= flat(cfg).keys()
    assert float(found["config"]["SOLVER.BASE_LR"]) == cfg.SOLVER.BASE_LR
    assert found["table"]["bbox/AP"] == results["bbox"]["AP"]
    assert found["pictures"] == {"report"}
    assert any("model_final" in model for model in found["models"])

"""The hook of experiment trackers in whole runs, with a tracker that keeps what it is given."""

import json
from pathlib import Path

import pytest
from shape_runs import metrics_of

from cascade_det.engine import loggers
from cascade_det.engine.loggers import LOGGERS, Logger
from cascade_det.errors import ConfigError

pytestmark = pytest.mark.usefixtures("no_pictures")


class Fake(Logger):
    """Keeps what it is given, and fails where it is told to."""

    def __init__(self, fails=""):
        super().__init__()
        self.fails, self.calls, self.rows = fails, [], []

    def start(self, values, folder, run):
        self._note("start")
        return "new" if run is None else f"{run} again"

    def scalars(self, iteration, values):
        self._note("scalars", iteration)
        self.rows.append({**values, "iteration": iteration})

    def evaluation(self, iteration, rows, pictures):
        self._note("evaluation", iteration)

    def model(self, file):
        self._note("model", file.name)

    def end(self, *, finished):
        self._note("end", finished)

    def _note(self, *call):
        if call[0] == self.fails:
            raise ConnectionError("the server is away")
        self.calls.append(call)


@pytest.fixture
def use(monkeypatch):
    """``use(fake)``: it takes the place of MLflow."""

    def put(fake):
        monkeypatch.setitem(loggers.LOGGERS, "mlflow", lambda: fake)
        monkeypatch.setattr(loggers, "check_installed", lambda _: None)
        monkeypatch.setattr("cascade_det.engine.output_dir.check_installed", lambda _: None)
        return fake

    return put


KEYS = ("CASCADE.LOGGERS", "('mlflow',)", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()")


def test_a_logger_that_fails_on_the_way_costs_no_training(host, make_cfg, use, caplog):
    log = use(Fake("scalars"))
    cfg = make_cfg(*KEYS, "DATASETS.TEST", "()")
    host.train(cfg)
    assert (Path(cfg.OUTPUT_DIR) / "model_final.pth").exists()
    assert log.calls == [("start",)]
    assert caplog.text.count("mlflow failed, and gets nothing more of this training") == 1
    assert "ConnectionError: the server is away" in caplog.text


def test_a_logger_that_cannot_start_ends_the_run_in_words(host, make_cfg, use):
    use(Fake("start"))
    with pytest.raises(ConfigError, match=r"LOGGERS: mlflow cannot start .*the server is away"):
        host.train(make_cfg(*KEYS, "DATASETS.TEST", "()"))


def test_each_evaluation_is_logged_once_where_it_was_made(host, make_cfg, use):
    log = use(Fake())
    host.train(make_cfg(*KEYS, "TEST.EVAL_PERIOD", "1"))
    assert [c for c in log.calls if c[0] == "evaluation"] == [("evaluation", 0), ("evaluation", 1)]
    best_and_final = [("model", "model_best.pth"), ("model", "model_final.pth")]
    assert log.calls[-3:] == [*best_and_final, ("end", True)]


def test_scalars_are_those_of_the_metrics_file(host, make_cfg, use):
    cfg = make_cfg(*KEYS)
    logged = {}
    for options, resume in ((("DATASETS.TEST", "()"), False), (("SOLVER.MAX_ITER", "3"), True)):
        log = use(Fake())
        host.train(make_cfg(*KEYS, *options), resume=resume)
        for row in log.rows:
            assert not logged.setdefault(row["iteration"], {}).keys() & row.keys() - {"iteration"}
            logged[row["iteration"]] |= row
    in_file = {}
    for line in metrics_of(cfg.OUTPUT_DIR):
        finite = {name: value for name, value in line.items() if value == value}
        in_file.setdefault(line["iteration"], {}).update(finite)
    for iteration in (0, 1, 2):
        assert logged[iteration]["total_loss"] == in_file[iteration]["total_loss"]
    assert logged[2].items() >= {k: v for k, v in in_file[2].items() if "/" in k and v}.items()


def test_a_new_start_in_a_folder_is_a_new_run(host, make_cfg, use):
    cfg = make_cfg(*KEYS, "DATASETS.TEST", "()")
    folder = Path(cfg.OUTPUT_DIR)
    use(Fake())
    host.train(cfg)
    assert json.loads((folder / "loggers.json").read_text()) == {"mlflow": "new"}
    use(Fake())
    host.train(cfg, resume=True)
    assert json.loads((folder / "loggers.json").read_text()) == {"mlflow": "new again"}
    for file in folder.glob("model_*.pth"):
        file.unlink()
    use(Fake())
    host.train(cfg)
    assert json.loads((folder / "loggers.json").read_text()) == {"mlflow": "new"}


def test_only_the_main_process_has_loggers(host, make_cfg, monkeypatch):
    cfg = make_cfg(*KEYS)
    assert len(loggers.logger_hooks(cfg)) == 1
    monkeypatch.setattr("cascade_det.parallel.distributed.is_main", lambda: False)
    assert loggers.logger_hooks(cfg) == []


@pytest.mark.parametrize("name", LOGGERS)
def test_a_missing_package_is_told_before_the_data_are_read(host, make_cfg, monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    cfg = make_cfg("CASCADE.LOGGERS", f"('{name}',)", "CASCADE.DATASETS", "()")
    with pytest.raises(ConfigError, match=rf"LOGGERS names '{name}'.*'cascade_det\[{name}\]'"):
        host.train(cfg)

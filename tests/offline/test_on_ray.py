"""Actors of Ray on this machine, two at a time; skipped where Ray is not installed."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from offline_runs import INSTANT, OPTIONS, detect, drawn, rows_of, served

from cascade_det.errors import CascadeDetError, CheckpointError
from cascade_det.offline.on_ray import Actors, run_on_ray

pytest.importorskip("pyarrow")
ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")
psutil = pytest.importorskip("psutil")

TWO = partial(run_on_ray, actors=Actors(least=2, most=2, cpus=1, gpus=0))


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Two processors, with niceness as here."""
    variables = {"RAY_worker_niceness": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    paths = os.pathsep.join(sys.path)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    yield
    ray.shutdown()
    for name, value in before.items():
        if value is None:
            del os.environ[name]


@pytest.fixture
def many(tmp_path):
    """A folder of small images, one of them broken."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number:02}.png").write_bytes(drawn(number)[: 200 if number == 3 else None])
    return folder


def actors_of_pool():
    named = [(process, " ".join(process.cmdline())) for process in all_children()]
    return [process for process, name in named if "MapWorker" in name]


def all_children():
    return [p for p in psutil.Process().children(recursive=True) if p.is_running()]


def test_a_killed_actor_loses_and_repeats_nothing(detector_cfg, many, tmp_path):
    killed = []

    def engine(job, parts):
        for counts in TWO(job, parts):
            if not killed:
                killed.append(actors_of_pool()[0])
                killed[0].kill()
            yield counts

    detect(detector_cfg(), [many], tmp_path / "alone", part_size=1)
    summary = detect(detector_cfg(), [many], tmp_path / "out", engine, part_size=1)
    assert killed
    assert (summary.images, summary.failed, summary.missing) == (10, 1, 0)
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "alone")


def test_a_killed_driver_is_continued(detector_cfg, detector_weights, many, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "cascade_det", "predict", "--engine", "ray"]
    command += ["--actors", "2", "2", "--part-size", "1", "--config-file", INSTANT]
    command += ["--input", str(many), "--output", str(output), "--opts", *map(str, OPTIONS)]
    command += ["MODEL.WEIGHTS", str(detector_weights)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    driver = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 600
    while len(done := list(output.glob("parts/part-*"))) < 2:
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = {path: path.stat().st_mtime_ns for path in map(Path, done)}
    summary = detect(detector_cfg(), [many], output, TWO, part_size=1)
    assert summary.found_done >= 2
    assert summary.missing == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    detect(detector_cfg(), [many], tmp_path / "alone", part_size=1)
    assert rows_of(output) == rows_of(tmp_path / "alone")


def test_an_error_of_ours_arrives_as_it_is(detector_cfg, detector_weights, many, tmp_path):
    mine = tmp_path / "mine.pth"
    mine.write_bytes(detector_weights.read_bytes())

    def engine(job, parts):
        mine.unlink()
        yield from TWO(job, parts)

    with pytest.raises(CheckpointError, match=r"mine\.pth"):
        detect(detector_cfg("MODEL.WEIGHTS", str(mine)), [many], tmp_path / "out", engine)


def test_a_part_in_which_actors_always_die_ends_the_run(detector_cfg, many, tmp_path):
    pytest.importorskip("aiohttp")

    def kill():
        for process in actors_of_pool():
            process.kill()

    one = partial(run_on_ray, actors=Actors(least=1, most=1, cpus=1, gpus=0))
    with (
        served(many, kill) as host,
        pytest.raises(CascadeDetError, match="3 actors died in it"),
    ):
        detect(detector_cfg(), [f"{host}/00.png"], tmp_path / "out", one)

"""Processes of this machine, which die now and then."""

import multiprocessing
import os
import signal
from functools import partial

import pytest
from offline_runs import INSTANT, OPTIONS, detect, rows_of, served, write_images

from cascade_det.commands import predict
from cascade_det.errors import CascadeDetError
from cascade_det.offline.local import run_local

pytest.importorskip("pyarrow")


@pytest.fixture
def many(tmp_path):
    """A folder of small images."""
    return write_images(tmp_path / "many", 8)


def test_a_killed_process_is_replaced_and_its_part_is_done_once(detector_cfg, many, tmp_path):
    output, killed = tmp_path / "out", []

    def engine(job, parts):
        for counts in run_local(job, parts, processes=2):
            if not killed:
                killed.append(multiprocessing.active_children()[0])
                os.kill(killed[0].pid, signal.SIGKILL)
            yield counts

    detect(detector_cfg(), [many], tmp_path / "alone")
    summary = detect(detector_cfg(), [many], output, engine)
    assert (summary.images, summary.missing, summary.failed) == (8, 0, 0)
    assert killed[0].exitcode == -signal.SIGKILL
    assert rows_of(output) == rows_of(tmp_path / "alone")
    assert multiprocessing.active_children() == []


def test_a_part_in_which_processes_always_die_ends_the_run(detector_cfg, many, tmp_path):
    pytest.importorskip("aiohttp")

    def kill():
        for process in multiprocessing.active_children():
            process.kill()

    with (
        served(many, kill) as host,
        pytest.raises(CascadeDetError, match=r"part-00000.* 3 processes ended in it.*SIGKILL"),
    ):
        detect(
            detector_cfg(), [f"{host}/00.png"], tmp_path / "out", partial(run_local, processes=1)
        )
    assert multiprocessing.active_children() == []


def test_the_command_says_what_is_wrong_in_a_process(many, tmp_path, capsys, detector_weights):
    """Weights that do not fit are noticed where the detector is built."""
    arguments = ["--config-file", INSTANT, "--engine", "local", "--input", str(many)]
    arguments += ["--output", str(tmp_path / "out"), "--opts", *map(str, OPTIONS)]
    arguments += ["MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.WEIGHTS", str(detector_weights)]
    assert predict.main(arguments) == 1
    error = capsys.readouterr().err
    assert f"{detector_weights}" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--merge"], "--merge is of --engine"),
        (["--actors", "1", "2"], "--actors is of --engine ray"),
        (["--engine", "local", "--num-gpus", "1"], "--num-gpus is of --engine ray"),
        (["--engine", "ray", "--processes", "2"], "--processes is of --engine local"),
        (["--engine", "ray", "--actors", "3", "2"], "MIN is more than MAX"),
        (["--engine", "local", "--share", "3/2"], "with K from 1 to N"),
        (["--engine", "local", "--share", "half"], "give K/N"),
        (["--engine", "local", "--input", "-"], "reads no stdin"),
        (["--engine", "local", "--score-threshold", "0"], "--engine detects with weights"),
    ],
)
def test_options_that_do_not_fit_the_engine_are_refused(options, complaint, capsys):
    with pytest.raises(SystemExit):
        predict.main(["--config-file", INSTANT, "--input", "x", "--output", "y", *options])
    assert complaint in capsys.readouterr().err

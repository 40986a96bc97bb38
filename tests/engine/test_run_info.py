"""What a checkpoint says of the run that wrote it, and what a run does to its folder."""

import logging
import os
from pathlib import Path

import pytest
import torch

from cascade_det.config import get_cfg
from cascade_det.engine.output_dir import check_output, record_start
from cascade_det.engine.run_info import RunInfo, usable_run_info
from cascade_det.errors import CheckpointError, ConfigError
from cascade_det.weights import read_weights_file

LEFT = ".cascade_det-0123456789abcdef.tmp"
GOOD = {"seed": 3, "class_names": ["cat", "dog"], "category_ids": [1, 18], "host": "standalone"}
BAD_CLASSES = {
    "a long name": {"class_names": ["cat", "d" * 10_000]},
    "a surrogate": {"class_names": ["cat", "d\udcffg"]},
    "a control character": {"class_names": ["cat", "d\x1b[31mg"]},
    "a bidi mark": {"class_names": ["cat", "d\u202eg"]},
    "an empty name": {"class_names": ["cat", " "]},
    "no text": {"class_names": ["cat", None]},
    "nested lists": {"class_names": ["cat", ["dog", ["dog"]]]},
    "one text": {"class_names": "ab"},
    "a dict": {"class_names": {"cat": 1, "dog": 2}},
    "a tensor": {"class_names": torch.zeros(2)},
    "no names": {"class_names": None},
    "very many": {"class_names": ["cat"] * 100_001, "category_ids": list(range(100_001))},
    "one id": {"category_ids": [1]},
    "no list of ids": {"category_ids": 1},
    "equal ids": {"category_ids": [1, 1]},
    "an id that is a float": {"category_ids": [1, 2.0]},
    "an id that is nan": {"category_ids": [1, float("nan")]},
    "an id that is a bool": {"category_ids": [True, 2]},
    "an id that is a list": {"category_ids": [[1], [2]]},
    "an id that is text": {"category_ids": ["1", "2"]},
    "an id of a hundred digits": {"category_ids": [1, 10**100]},
}


def read_back(folder, run):
    torch.save({"model": {"w": torch.ones(1)}, "run": run}, folder / "model.pth")
    return usable_run_info(read_weights_file(folder / "model.pth").run, folder / "model.pth")


def test_it_is_what_was_written(tmp_path):
    assert read_back(tmp_path, GOOD) == GOOD


@pytest.mark.parametrize("changes", BAD_CLASSES.values(), ids=BAD_CLASSES)
def test_unusable_classes_are_left_out_with_a_warning(changes, tmp_path, caplog):
    file = tmp_path / "model.pth"
    with caplog.at_level(logging.WARNING):
        assert read_back(tmp_path, {**GOOD, **changes}) == {"seed": 3, "host": "standalone"}
    (message,) = caplog.messages
    assert str(file) in message
    assert "class_names" in message or "category_ids" in message
    assert len(message) < len(str(file)) + 400
    assert message.isprintable()


@pytest.mark.parametrize("run", [[1], "text", None, 3, torch.zeros(2), {1: 2}, {}])
def test_a_run_of_another_kind_says_nothing(run, tmp_path):
    assert not read_back(tmp_path, run).keys() & {"class_names", "category_ids"}


@pytest.mark.parametrize("changes", BAD_CLASSES.values(), ids=BAD_CLASSES)
def test_nothing_is_resumed_with_such_classes(changes):
    info = RunInfo(0, ["cat", "dog"], [1, 18], "standalone")
    with pytest.raises(CheckpointError, match=r"class_names|category_ids"):
        info.load_state_dict({**GOOD, **changes})
    assert info.seed == 0


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, float("inf"), "3", None, True, [3]])
def test_nothing_is_resumed_with_such_a_seed(seed):
    with pytest.raises(CheckpointError, match="seed"):
        RunInfo(0, ["cat", "dog"], [1, 18], "standalone").load_state_dict({**GOOD, "seed": seed})


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    cfg.DATASETS.TEST = ("val", "other")
    cfg.MODEL.WEIGHTS = "R-50.pkl"
    return cfg


def test_a_run_keeps_a_handwritten_configuration(cfg, tmp_path):
    """Often the very one that it was started with, comments and all."""
    file = Path(cfg.OUTPUT_DIR) / "config.yaml"
    record_start(cfg, resume=False)
    check_output(cfg, resume=False)  # of a run that was killed before its first checkpoint
    mine = f"# mine\nSOLVER:\n  BASE_LR: 0.1\nOUTPUT_DIR: {tmp_path}\n"
    for content in (mine, "model: {name: another program}\n", "- 1\n", ""):
        file.write_text(content)
        with pytest.raises(ConfigError, match=r"config\.yaml that no run wrote"):
            check_output(cfg, resume=False)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ConfigError, match="that no run wrote"):
        check_output(cfg, resume=False)


def test_leftovers_go_where_a_run_writes_and_nowhere_else(cfg, tmp_path):
    ours = ["", "inference", "analysis", "analysis/worst_images", "other/analysis", "val/inference"]
    others = ["notes", "notes/analysis", "analysis/of/mine"]
    for folder in (*ours, *others):
        (tmp_path / "run" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / folder / LEFT).write_text("half")
        (tmp_path / "run" / folder / ".draft.2024.tmp").write_text("mine")
    (tmp_path / "run" / ".folder.2024.tmp").mkdir()
    os.mkfifo(tmp_path / "run" / ".fifo.2024.tmp")
    (tmp_path / "run" / "loop").symlink_to(tmp_path / "run")
    record_start(cfg, resume=False)
    for folder in ours:
        assert not (tmp_path / "run" / folder / LEFT).exists()
    for folder in others:
        assert (tmp_path / "run" / folder / LEFT).exists()
    drafts = list((tmp_path / "run").rglob(".draft.2024.tmp"))
    assert len(drafts) == len(ours) + len(others)
    assert (tmp_path / "run" / "config.yaml").exists()

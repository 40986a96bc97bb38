"""What a run does to its folder before it trains."""

import os

import pytest

from cascade_det.config import get_cfg
from cascade_det.engine.run_info import record_start

LEFT = ".cascade_det-0123456789abcdef.tmp"


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    cfg.DATASETS.TEST = ("val", "other")
    cfg.MODEL.WEIGHTS = "R-50.pkl"
    return cfg


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

"""``SOLVER.IMS_PER_BATCH`` 0, with steps that run out of memory as a small GPU would."""

from pathlib import Path

import pytest
import torch
from small_segmenter import squares_run, write_squares

from cascade_det.engine import automatic_batch
from cascade_det.engine.step import TrainingStep
from cascade_det.errors import ConfigError

AUTOMATIC = ("SOLVER.IMS_PER_BATCH", "0", "SOLVER.MAX_ITER", "2", "SOLVER.BASE_LR", "0.008")


def weights_of(cfg):
    return torch.load(Path(cfg.OUTPUT_DIR, "model_final.pth"), weights_only=True)["model"]


def settings_of(cfg, host):
    solver = host.load_config([f"{cfg.OUTPUT_DIR}/config.yaml"], []).SOLVER
    return solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER


@pytest.fixture
def tried(monkeypatch):
    """A GPU with memory for three images; the sizes of the batches that were run."""
    sizes = []
    run = TrainingStep.run

    def limited(self, batch, iteration, **rest):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(self, batch, iteration, **rest)

    monkeypatch.setattr(TrainingStep, "run", limited)
    monkeypatch.setattr(automatic_batch, "resolve_device", lambda cfg: torch.device("cuda"))
    return sizes


def test_the_largest_that_fits_trains_as_if_it_were_given(host, make_cfg, tried, caplog):
    caplog.set_level("INFO")
    cfg = make_cfg(*AUTOMATIC)
    host.train(cfg)
    # 2 / 16 of the rate, 8 times the iterations; two steps each, from the first that fits.
    assert settings_of(cfg, host) == (2, 0.001, 16)
    assert tried == [64, 32, 16, 8, 4, 2, 2] + [2] * 16
    assert "SOLVER.BASE_LR 0.008 -> 0.001" in caplog.text

    # config.yaml is the run without the search.
    file, other = f"{cfg.OUTPUT_DIR}/config.yaml", f"{cfg.OUTPUT_DIR}_given"
    given = host.load_config([file], ["OUTPUT_DIR", other])
    host.train(given)
    ours, theirs = weights_of(cfg), weights_of(given)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_resumed_run_keeps_its_size(host, make_cfg, tried):
    cfg = make_cfg(*AUTOMATIC, "SOLVER.CHECKPOINT_PERIOD", "1")
    host.train(cfg)
    Path(cfg.OUTPUT_DIR, "last_checkpoint").write_text("model_0000007.pth")
    Path(cfg.OUTPUT_DIR, "model_final.pth").unlink()
    tried.clear()
    host.train(cfg, resume=True)
    assert settings_of(cfg, host) == (2, 0.001, 16)
    assert tried == [2] * 8


def test_parts_of_a_batch_are_tried_together(host, make_cfg, monkeypatch, tried):
    parts = []
    backward = TrainingStep._backward
    monkeypatch.setattr(
        TrainingStep,
        "_backward",
        lambda self, batch, share: parts.append(len(batch)) or backward(self, batch, share),
    )
    monkeypatch.setattr(automatic_batch, "_MOST", 1)
    cfg = make_cfg(*AUTOMATIC, "CASCADE.ACCUMULATION_STEPS", "2")
    host.train(cfg)
    assert settings_of(cfg, host)[0] == 2
    assert set(parts) == {1}


def test_no_image_fits(host, make_cfg, monkeypatch):
    def run(self, batch, iteration, **rest):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(TrainingStep, "run", run)
    monkeypatch.setattr(automatic_batch, "resolve_device", lambda cfg: torch.device("cuda"))
    cfg = make_cfg(*AUTOMATIC)
    with pytest.raises(ConfigError, match=r"not even one image fits .* lower INPUT.MIN_SIZE_TRAIN"):
        host.train(cfg)
    assert not Path(cfg.OUTPUT_DIR, "config.yaml").exists()


def test_it_is_for_gpus(host, make_cfg):
    with pytest.raises(ConfigError, match=r"IMS_PER_BATCH is 0: .* on the CPU. Give the number"):
        host.train(make_cfg(*AUTOMATIC))


def test_segmenters_find_theirs(host, tmp_path, tried):
    write_squares(tmp_path)
    cfg = host.load_config([], [*squares_run(tmp_path), *AUTOMATIC, "DATASETS.TEST", ()])
    host.train(cfg)
    assert settings_of(cfg, host) == (2, 0.001, 16)
    assert tried == [64, 32, 16, 8, 4, 2, 2] + [2] * 16

"""Keys of ``MODEL.CASCADE.TRAINING`` in whole runs."""

from pathlib import Path

import pytest
import torch
from shape_runs import saved

from cascade_det.engine.step import TrainingStep
from cascade_det.engine.training_modes import progress_of
from cascade_det.errors import CheckpointError

NODE = "MODEL.CASCADE.TRAINING"
SHORT = ("DATASETS.TEST", "()", "SOLVER.STEPS", "()", "SOLVER.MAX_ITER")
# The period of the dynamic thresholds begins before the checkpoint of iteration 2 and ends after.
EVERYTHING = [
    *(f"{NODE}.GATING", "soft", f"{NODE}.PREFIX_LOSS_WEIGHT", "0.5"),
    *(f"{NODE}.STAGE_WEIGHTING", "scheduled", f"{NODE}.STAGE_LOSS_WEIGHTS_END", "(0.2, 0.5, 1.0)"),
    *(f"{NODE}.DYNAMIC.ENABLED", "True", f"{NODE}.DYNAMIC.PERIOD", "2"),
    *(f"{NODE}.DYNAMIC.K_I", "2", f"{NODE}.DYNAMIC.K_BETA", "1"),
    *(f"{NODE}.DYNAMIC.IOU_FLOOR", "0.1"),
    *(f"{NODE}.CLASS_LOSS", "seesaw"),
]
LEARNED = [
    *("MODEL.CASCADE.EXIT.ENABLED", "True", f"{NODE}.FREEZE_DETECTOR", "True"),
    *("MODEL.CASCADE.EXIT.LEARNED", "('iou_head', 'gate', 'pruner')"),
]


ALL_PARTS = "('iou_head', 'gate', 'pruner', 'tile_head')"


def test_a_resumed_schedule_continues(host, make_cfg, monkeypatch):
    shares = []
    step = TrainingStep.run

    def watched(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        shares.append(progress_of(self.module))
        return result

    monkeypatch.setattr(TrainingStep, "run", watched)
    cfg = make_cfg(*SHORT, "4", *EVERYTHING)
    host.train(cfg)
    assert shares == [0, 0.25, 0.5, 0.75]
    dynamic = "roi_heads.regime.dynamic."
    before, straight = saved(cfg, "model_0000002.pth")["model"], saved(cfg)["model"]
    assert [before[dynamic + "passes"], straight[dynamic + "passes"]] == [3, 4]
    assert (before[dynamic + "iou_counts"] == 1).all()
    counts = [state["roi_heads.regime.class_loss.counts"].sum() for state in (before, straight)]
    assert 0 < counts[0] < counts[1]
    # The run reached the end of a period after the checkpoint.
    assert not torch.equal(before[dynamic + "iou_statistics"], straight[dynamic + "iou_statistics"])

    Path(cfg.OUTPUT_DIR, "last_checkpoint").write_text("model_0000002.pth")
    host.train(cfg, resume=True)
    assert shares[4:] == [0.75]
    resumed = saved(cfg)["model"]
    assert resumed.keys() == straight.keys()
    assert resumed[dynamic + "passes"] == 4
    if host.name == "standalone":  # Detectron2 draws other images after a resume
        assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    with pytest.raises(CheckpointError, match="beta_history"):
        host.train(make_cfg(*SHORT, "5", *EVERYTHING, f"{NODE}.DYNAMIC.PERIOD", "3"), resume=True)


def test_exits_are_added_to_a_trained_detector(host, make_cfg):
    norms = ["MODEL.RESNETS.NORM", "BN"]
    detector = make_cfg(*SHORT, "1", *norms, output="detector")
    host.train(detector)
    weights = ["MODEL.WEIGHTS", str(Path(detector.OUTPUT_DIR, "model_final.pth"))]
    averaged = ["CASCADE.EMA_DECAY", "0.5", "SOLVER.WARMUP_ITERS", "0"]
    learned = [*LEARNED[:-1], ALL_PARTS] if host.name == "standalone" else LEARNED
    cfg = make_cfg(*SHORT, "2", *norms, *weights, *learned, *averaged)
    host.train(cfg)
    before, checkpoint = saved(detector)["model"], saved(cfg)
    for entry in ("model", "training_weights"):
        after = checkpoint[entry]
        assert all(torch.equal(after[name], value) for name, value in before.items())
        added = after.keys() - before.keys()
        assert added
        assert all(name.startswith("roi_heads.exits.learned.") for name in added)
    assert all(value.any() for name, value in after.items() if name.endswith("logit.bias"))
    trainer = checkpoint["trainer"]
    optimizer = (
        trainer["optimizer"] if host.name == "standalone" else trainer["_trainer"]["optimizer"]
    )
    statistics = "roi_heads.exits.learned.tile_head.norm"
    assert set(optimizer["state"]) == {name for name in added if not name.startswith(statistics)}

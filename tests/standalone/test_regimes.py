"""Training regimes in whole runs: resumed to the bit, and exits added to a trained detector."""

from pathlib import Path

import pytest
import torch

from cascade_det.config import load_config
from cascade_det.errors import CheckpointError
from cascade_det.standalone import train

NODE = "MODEL.CASCADE.TRAINING"
# A period that begins before the checkpoint of iteration 2 and ends behind it.
EVERYTHING = [
    *(f"{NODE}.GATING", "soft", f"{NODE}.PREFIX_LOSS_WEIGHT", "0.5"),
    *(f"{NODE}.STAGE_WEIGHTING", "scheduled", f"{NODE}.STAGE_LOSS_WEIGHTS_END", "(0.2, 0.5, 1.0)"),
    *(f"{NODE}.DYNAMIC.ENABLED", "True", f"{NODE}.DYNAMIC.PERIOD", "2"),
    *(
        f"{NODE}.DYNAMIC.K_I",
        "2",
        f"{NODE}.DYNAMIC.K_BETA",
        "1",
        f"{NODE}.DYNAMIC.IOU_FLOOR",
        "0.1",
    ),
]
LEARNED = [
    *("MODEL.CASCADE.EXIT.ENABLED", "True", f"{NODE}.FREEZE_DETECTOR", "True"),
    *("MODEL.CASCADE.EXIT.LEARNED", "('iou_head', 'gate', 'pruner')"),
]
INSTANT = Path(__file__).resolve().parents[2] / "configs/quick_schedules/instant_test.yaml"


@pytest.fixture
def run(shape_options, tmp_path):
    """Trains with options, in a folder; gives the last checkpoint."""

    def train_in(name, *options, resume=False):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        base = [*shape_options, "DATASETS.TEST", "()", "OUTPUT_DIR", str(folder)]
        train(load_config(INSTANT, [*base, *options]), resume=resume)
        return torch.load(folder / "model_final.pth", weights_only=True)

    return train_in


def test_a_resumed_regime_equals_an_uninterrupted_one(run, tmp_path):
    options = [*EVERYTHING, "SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "()"]
    straight = run("run", *options)["model"]
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000002.pth")
    before = torch.load(tmp_path / "run" / "model_0000002.pth", weights_only=True)["model"]
    resumed = run("run", *options, resume=True)["model"]
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    name = "roi_heads.regime.dynamic."
    assert [before[name + "passes"], straight[name + "passes"]] == [3, 4]
    assert (before[name + "iou_counts"] == 1).all()
    # The run reached the end of a period behind the checkpoint.
    assert not torch.equal(before[name + "iou_statistics"], straight[name + "iou_statistics"])
    with pytest.raises(CheckpointError, match="beta_history"):
        run("run", *options, f"{NODE}.DYNAMIC.PERIOD", "3", resume=True)


def test_exits_are_added_to_a_trained_detector(run, tmp_path):
    short = ["SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", "0"]
    norms = ["MODEL.RESNETS.NORM", "BN"]
    detector = run("detector", *short, *norms)["model"]
    weights = ["MODEL.WEIGHTS", str(tmp_path / "detector" / "model_final.pth")]
    averaged = ["CASCADE.EMA_DECAY", "0.5", "SOLVER.BASE_LR", "0.1"]
    checkpoint = run("exits", *short, *norms, *weights, *LEARNED, *averaged)
    with_exits = checkpoint["model"]
    assert all(torch.equal(with_exits[name], value) for name, value in detector.items())
    added = with_exits.keys() - detector.keys()
    assert added
    assert all(name.startswith("roi_heads.exits.learned.") for name in added)
    assert any(with_exits[name].abs().max() > 0 for name in added if name.endswith("logit.bias"))
    optimised = checkpoint["trainer"]["optimizer"]["state"]
    assert set(optimised) == added

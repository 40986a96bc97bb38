"""Runs with a mask head for every stage: trained, averaged, evaluated, frozen."""

import json
import math
import shutil

import pytest
import torch

from cascade_det.hosts import load_host

pytestmark = pytest.mark.usefixtures("no_pictures")

EVERY = [
    *("MODEL.MASK_ON", "True", "MODEL.CASCADE.MASK.STAGES", "every"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", "1", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8"),
    *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", "7", "SOLVER.MAX_ITER", "2"),
]


@pytest.fixture
def octagons(shapes, tmp_path):
    """Options of a data set with an octagon in each box."""
    for split in ("train", "val"):
        shutil.copytree(shapes / split, tmp_path / split)
        content = json.loads((shapes / f"{split}.json").read_text())
        for annotation in content["annotations"]:
            x, y, w, h = annotation["bbox"]
            angles = [number * math.pi / 4 for number in range(8)]
            corners = [
                (x + w * (1 + math.cos(a)) / 2, y + h * (1 + math.sin(a)) / 2) for a in angles
            ]
            annotation["segmentation"] = [[value for corner in corners for value in corner]]
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    names = [(f"own_{s}", str(tmp_path / f"{s}.json"), str(tmp_path / s)) for s in ("train", "val")]
    keys = ["CASCADE.DATASETS", str(names)]
    return [*keys, "DATASETS.TRAIN", "('own_train',)", "DATASETS.TEST", "('own_val',)"]


def test_a_mask_head_for_every_stage(host, make_cfg, octagons, tmp_path):
    more = ["CASCADE.EMA_DECAY", "0.9", "CASCADE.VALIDATION_LOSS", "True"]
    more += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    results = host.train(make_cfg(*octagons, *EVERY, *more))
    output = tmp_path / "output"
    assert {"loss_mask_stage0", "loss_mask_stage2"} <= results["validation"].keys()
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    trained = next(line for line in lines if "loss_mask_stage2" in line)
    assert trained["loss_mask_stage2"] > 0
    assert 0 <= trained["stage2/mask_rcnn/accuracy"] <= 1
    saved = json.loads((output / "results.json").read_text())
    assert saved["segm"].keys() >= {"AP", "AP50", "AP90", "APs"}
    # Without exits the last stage is the cascade.
    assert saved["stages"]["stage2"]["segm"]["AP"] == pytest.approx(saved["segm"]["AP"], abs=1e-6)
    assert saved["latency"]["parts"]["masks"]["median_ms"] > 0
    names = torch.load(output / "model_final.pth", weights_only=True)["training_weights"]
    assert "roi_heads.mask_head.2.predictor.weight" in names
    if host.name == "detectron2":
        # The other host has the same AP with these weights.
        other = load_host("standalone")
        keys = [*octagons, *EVERY, *more, "MODEL.WEIGHTS", str(output / "model_final.pth")]
        cfg = other.load_config(output / "config.yaml", [*keys, "OUTPUT_DIR", str(tmp_path / "o")])
        again = other.evaluate(cfg)
        for task in ("bbox", "segm"):
            assert again[task]["AP"] == pytest.approx(results[task]["AP"], abs=1e-4)


def test_exits_trained_alone_leave_mask_heads_as_they_are(host, make_cfg, octagons, tmp_path):
    torch.manual_seed(0)
    learned = ["MODEL.CASCADE.EXIT.LEARNED", "('gate',)", "DATASETS.TEST", "()"]
    host.train(make_cfg(*octagons, *EVERY, *learned, output="before"))
    weights = str(tmp_path / "before" / "model_final.pth")
    frozen = ["MODEL.CASCADE.TRAINING.FREEZE_DETECTOR", "True", "MODEL.WEIGHTS", weights]
    host.train(make_cfg(*octagons, *EVERY, *learned, *frozen, output="after"))
    states = [
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]
        for name in ("before", "after")
    ]
    changed = {name for name, value in states[0].items() if not torch.equal(value, states[1][name])}
    assert changed
    assert all(name.startswith("roi_heads.exits.learned.") for name in changed)
    lines = (tmp_path / "after" / "metrics.json").read_text()
    assert "loss_exit" in lines
    assert "loss_mask" not in lines

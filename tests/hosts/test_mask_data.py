"""The masks of drawn shapes, which are RLE, in both hosts: trained, replayed, refused."""

import json
import shutil

import pytest
import torch

from cascade_det.errors import DatasetError

pytestmark = pytest.mark.usefixtures("no_pictures")

MASKS = [
    *("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", "1", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8"),
    *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", "7", "INPUT.MASK_FORMAT", "bitmask"),
    *("SOLVER.MAX_ITER", "2"),
]


def broken_weights(make_cfg, build_model, folder):
    """Weights whose mask head overflows."""
    model = build_model(make_cfg(*MASKS)).state_dict()
    model["roi_heads.mask_head.deconv.weight"].fill_(3e38)
    torch.save({"model": model}, folder / "broken.pth")
    return str(folder / "broken.pth")


def test_masks_of_drawn_shapes_are_trained(host, make_cfg, tmp_path):
    options = ["CASCADE.VALIDATION_LOSS", "True", "CASCADE.BEST_METRIC", "validation/loss_mask"]
    results = host.train(make_cfg(*MASKS, *options))
    assert 0.3 < results["validation"]["loss_mask"] < 3
    lines = map(json.loads, (tmp_path / "output" / "metrics.json").read_text().splitlines())
    losses = [line["loss_mask"] for line in lines if "loss_mask" in line]
    assert losses
    assert all(0.3 < loss < 3 for loss in losses)


def test_a_step_with_masks_that_diverges_is_replayed(host, make_cfg, build_model, tmp_path):
    weights = broken_weights(make_cfg, build_model, tmp_path)
    cfg = make_cfg(*MASKS, "DATASETS.TEST", "()", "MODEL.WEIGHTS", weights)
    with pytest.raises(FloatingPointError, match=r"iteration 0, in the detector, loss_mask is nan"):
        host.train(cfg)
    (file,) = (tmp_path / "output").glob("diverged_*.pth")
    report = host.replay_batch(cfg, file)
    assert "loss_mask nan" in report
    assert any(
        line.startswith("outputs that are not finite: roi_heads.mask_head") for line in report
    )


def test_bad_masks_end_a_run_before_its_first_step(host, make_cfg, shapes, tmp_path):
    shutil.copytree(shapes / "train", tmp_path / "train")
    content = json.loads((shapes / "train.json").read_text())
    content["annotations"][0]["segmentation"]["counts"] = "0X"
    (tmp_path / "train.json").write_text(json.dumps(content))
    own = [("hurt_train", str(tmp_path / "train.json"), str(tmp_path / "train"))]
    options = ["CASCADE.DATASETS", str(own), "DATASETS.TRAIN", "('hurt_train',)"]
    with pytest.raises(DatasetError, match="1 x mask whose RLE has 'counts' that are not"):
        host.train(make_cfg(*MASKS, *options, "DATASETS.TEST", "()"))
    host.train(make_cfg(*MASKS, *options, "DATASETS.TEST", "()", "MODEL.MASK_ON", "False"))

"""Whole runs of the standalone host."""

import json

import pytest
import torch
from shape_runs import assert_same
from small_backbones import HIERVIT

from cascade_det.data.catalog import find_dataset
from cascade_det.errors import CheckpointError
from cascade_det.standalone import replay_batch, train


def weights_of(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


@pytest.fixture
def output(instant_cfg):
    from pathlib import Path

    folder = Path(instant_cfg.OUTPUT_DIR)
    folder.mkdir(parents=True)
    return folder


def test_a_run_leaves_what_detectron2_leaves(instant_cfg, output):
    results = train(instant_cfg)
    files = {str(p.relative_to(output)) for p in output.rglob("*")}
    assert {
        "metrics.json",
        "model_0000002.pth",
        "model_final.pth",
        "last_checkpoint",
        "inference/coco_instances_results.json",
        "results.json",
        "report.png",
        "report.html",
    } <= files
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert lines[-1]["iteration"] == 5
    assert {
        "total_loss",
        "loss_cls_stage2",
        "lr",
        "eta_seconds",
        "stage0/iou_before",
    } <= set().union(*lines)
    assert set(results) >= {"bbox", "stages", "exits", "latency"}
    assert set(results["stages"]) >= {"stage0", "stage1", "stage2"}
    saved = json.loads((output / "results.json").read_text())
    assert saved["exits"]["images"] == results["exits"]["images"] == 3
    checkpoint = torch.load(output / "model_final.pth", weights_only=True)
    assert checkpoint["run"]["class_names"] == list(
        json_names(instant_cfg, instant_cfg.DATASETS.TRAIN[0])
    )


def json_names(cfg, name):
    source = find_dataset(name, cfg.CASCADE.DATASETS)
    categories = json.loads(source.json_file.read_text())["categories"]
    return [c["name"] for c in sorted(categories, key=lambda c: c["id"])]


def test_a_drawn_seed_is_kept_over_a_resume(instant_cfg, output, caplog):
    instant_cfg.DATASETS.TEST = ()
    instant_cfg.SEED = -1
    train(instant_cfg)
    seed = torch.load(output / "model_final.pth", weights_only=True)["run"]["seed"]
    (output / "last_checkpoint").write_text("model_0000002.pth")
    train(instant_cfg, resume=True)
    assert torch.load(output / "model_final.pth", weights_only=True)["run"]["seed"] == seed


def test_drop_path_goes_on_as_if_the_run_had_never_stopped(instant_cfg, output):
    instant_cfg.merge_from_list([*HIERVIT, "MODEL.HIERVIT.DROP_PATH", 0.3, "DATASETS.TEST", ()])
    instant_cfg.merge_from_list(["SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 1])
    train(instant_cfg)
    wanted = weights_of(output)
    (output / "last_checkpoint").write_text("model_0000000.pth")
    (output / "model_final.pth").unlink()
    torch.manual_seed(7)
    train(instant_cfg, resume=True)
    assert_same(weights_of(output), wanted)


def test_training_learns(instant_cfg, output):
    """Three images, learned by heart: anchors are told apart and the objects are found."""
    instant_cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    instant_cfg.MODEL.RESNETS.NORM = "GN"
    instant_cfg.MODEL.FPN.NORM = "GN"
    instant_cfg.CASCADE.OPTIMIZER = "AdamW"
    instant_cfg.SOLVER.BASE_LR = 0.002
    instant_cfg.SOLVER.MAX_ITER = 80
    instant_cfg.SOLVER.STEPS = ()
    instant_cfg.SOLVER.CHECKPOINT_PERIOD = 100
    instant_cfg.INPUT.RANDOM_FLIP = "none"
    instant_cfg.DATASETS.TRAIN = ("shapes_val",)
    instant_cfg.MODEL.CASCADE.EXIT.ENABLED = False
    instant_cfg.TEST.EVAL_PERIOD = 0
    results = train(instant_cfg)
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    losses = [line["loss_rpn_cls"] for line in lines if "loss_rpn_cls" in line]
    assert losses[-1] < 0.4 * losses[0]
    assert results["bbox"]["AP50"] > 20
    assert results["stages"]["stage0"]["iou_after"] > results["stages"]["stage0"]["iou_before"]


@pytest.mark.parametrize(
    ("freeze_at", "norm", "warned"), [(0, "BN", 0), (2, "BN", 1), (0, "FrozenBN", 1)]
)
def test_frozen_random_weights_are_pointed_out(
    instant_cfg, output, caplog, freeze_at, norm, warned
):
    instant_cfg.DATASETS.TEST = ()
    instant_cfg.SOLVER.MAX_ITER = 1
    instant_cfg.SOLVER.STEPS = ()
    instant_cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    instant_cfg.MODEL.RESNETS.NORM = norm
    train(instant_cfg)
    assert sum("MODEL.BACKBONE.FREEZE_AT" in message for message in caplog.messages) == warned


def test_resuming_with_another_set_of_trained_parameters_is_refused(instant_cfg, output):
    instant_cfg.DATASETS.TEST = ()
    train(instant_cfg)
    instant_cfg.MODEL.BACKBONE.FREEZE_AT = 3
    instant_cfg.SOLVER.MAX_ITER = 7
    with pytest.raises(CheckpointError, match=r"model_final\.pth.*backbone.*FREEZE_AT"):
        train(instant_cfg, resume=True)


def test_resuming_another_model_shows_both_sides_and_the_keys(instant_cfg, output):
    instant_cfg.DATASETS.TEST = ()
    train(instant_cfg)
    instant_cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 48
    with pytest.raises(CheckpointError) as error:
        train(instant_cfg, resume=True)
    assert "fc1.weight is (32, 1568) in the file, (48, 1568) in the model" in str(error.value)
    assert "only in the model" not in str(error.value)
    assert "Changed since: MODEL.ROI_BOX_HEAD.FC_DIM 32 -> 48." in str(error.value)


def test_a_batch_that_diverges_is_replayed_to_the_broken_part(instant_cfg, output, tmp_path):
    instant_cfg.DATASETS.TEST = ()
    train(instant_cfg)
    checkpoint = torch.load(output / "model_final.pth", weights_only=True)
    checkpoint["model"]["roi_heads.box_predictor.1.bbox_pred.weight"].fill_(3e38)
    torch.save(checkpoint["model"], tmp_path / "broken.pth")
    instant_cfg.MODEL.WEIGHTS = str(tmp_path / "broken.pth")
    instant_cfg.OUTPUT_DIR = str(output / "broken")
    with pytest.raises(
        FloatingPointError, match=r"iteration 0, in stage 1 of the cascade"
    ) as error:
        train(instant_cfg)
    assert "model_start.pth" in str(error.value)
    (file,) = (output / "broken").glob("diverged_*.pth")
    report = "\n".join(replay_batch(instant_cfg, file))
    assert "outputs that are not finite: roi_heads.box_predictor.1.bbox_pred" in report
    assert "loss_box_reg_stage1 inf" in report


def test_backend_keys_are_applied(instant_cfg, output, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    precision = torch.get_float32_matmul_precision()
    instant_cfg.CUDNN_BENCHMARK = True
    instant_cfg.FLOAT32_PRECISION = "high"
    instant_cfg.DATASETS.TEST = ()
    instant_cfg.SOLVER.MAX_ITER = 1
    try:
        train(instant_cfg)
        assert torch.backends.cudnn.benchmark
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(precision)

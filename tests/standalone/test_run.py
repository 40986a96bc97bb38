"""The whole road: train, resume, evaluate."""

import json
import logging

import pytest
import torch

from cascade_det.config import load_config
from cascade_det.data.catalog import find_dataset
from cascade_det.errors import CheckpointError, ConfigError, DatasetError
from cascade_det.standalone import evaluate, replay_batch, train


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


def test_a_resumed_run_equals_an_uninterrupted_one(instant_cfg, output, tmp_path):
    instant_cfg.DATASETS.TEST = ()
    train(instant_cfg)
    straight = weights_of(output)

    again = instant_cfg.clone()
    again.OUTPUT_DIR = str(tmp_path / "again")
    (tmp_path / "again").mkdir()
    train(again)
    (tmp_path / "again" / "model_final.pth").unlink()
    (tmp_path / "again" / "last_checkpoint").write_text("model_0000002.pth")
    train(again, resume=True)
    resumed = weights_of(tmp_path / "again")
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[k], straight[k]) for k in straight)


def test_another_seed_gives_other_weights(instant_cfg, output):
    instant_cfg.DATASETS.TEST = ()
    instant_cfg.SOLVER.MAX_ITER = 1
    instant_cfg.SOLVER.STEPS = ()
    train(instant_cfg)
    first = weights_of(output)
    instant_cfg.SEED = 1
    instant_cfg.OUTPUT_DIR = str(output / "other")
    train(instant_cfg)
    name = "roi_heads.box_head.0.fc1.weight"
    assert not torch.equal(first[name], weights_of(output / "other")[name])


def test_a_drawn_seed_is_kept_over_a_resume(instant_cfg, output, caplog):
    instant_cfg.DATASETS.TEST = ()
    instant_cfg.SEED = -1
    train(instant_cfg)
    seed = torch.load(output / "model_final.pth", weights_only=True)["run"]["seed"]
    (output / "last_checkpoint").write_text("model_0000002.pth")
    train(instant_cfg, resume=True)
    assert torch.load(output / "model_final.pth", weights_only=True)["run"]["seed"] == seed


def test_epochs_are_the_length_of_a_run_and_of_its_resume(instant_cfg, output, caplog):
    instant_cfg.DATASETS.TEST = ()
    instant_cfg.CASCADE.EPOCHS = 0.5  # of six images, two at once
    train(instant_cfg)
    assert torch.load(output / "model_final.pth", weights_only=True)["iteration"] == 1
    recorded = load_config(output / "config.yaml")
    assert (recorded.CASCADE.EPOCHS, recorded.SOLVER.MAX_ITER) == (0.5, 2)
    for cfg in (instant_cfg, recorded):  # with what was given, and with what was made of it
        caplog.clear()
        with caplog.at_level(logging.INFO):
            train(cfg, resume=True)
        assert "2 iterations x 2 images = 0.667 epochs of 6 images" in caplog.text
        assert "Resumed with another" not in caplog.text


def test_evaluation_repeats_the_figures_of_training(instant_cfg, output):
    instant_cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    results = train(instant_cfg)
    instant_cfg.MODEL.WEIGHTS = str(output / "model_final.pth")
    again = evaluate(instant_cfg)
    assert again["bbox"] == pytest.approx(results["bbox"], nan_ok=True)
    assert again["stages"]["stage2"] == pytest.approx(results["stages"]["stage2"], nan_ok=True)
    resumed = instant_cfg.clone()
    resumed.MODEL.WEIGHTS = ""
    assert evaluate(resumed, resume=True)["bbox"] == pytest.approx(results["bbox"], nan_ok=True)


def test_several_test_sets_have_results_of_their_own(instant_cfg, output):
    instant_cfg.SOLVER.MAX_ITER = 1
    instant_cfg.SOLVER.STEPS = ()
    instant_cfg.DATASETS.TEST = ("shapes_val", "shapes_train")
    results = train(instant_cfg)
    assert set(results) == {"shapes_val", "shapes_train"}
    assert results["shapes_train"]["exits"]["images"] == 6
    assert (output / "shapes_val" / "results.json").is_file()


def test_wrong_class_count_is_found_before_the_first_step(instant_cfg):
    instant_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    with pytest.raises(ConfigError, match=r"NUM_CLASSES is 4.*6 categories.*NUM_CLASSES 6"):
        train(instant_cfg)


def test_missing_things_are_named(instant_cfg, tmp_path):
    instant_cfg.MODEL.WEIGHTS = str(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"none\.pth"):
        evaluate(instant_cfg)
    instant_cfg.MODEL.WEIGHTS = ""
    with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTS"):
        evaluate(instant_cfg)
    instant_cfg.DATASETS.TRAIN = ()
    with pytest.raises(ConfigError, match=r"DATASETS\.TRAIN"):
        train(instant_cfg)
    instant_cfg.DATASETS.TEST = ()
    with pytest.raises(ConfigError, match=r"DATASETS\.TEST"):
        evaluate(instant_cfg)
    instant_cfg.DATASETS.TRAIN = ("shape_train",)
    with pytest.raises(DatasetError, match="shapes_train"):
        train(instant_cfg)


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


def test_evaluating_on_the_way_changes_no_weight(instant_cfg, output, tmp_path):
    instant_cfg.TEST.EVAL_PERIOD = 2
    train(instant_cfg)
    quiet = instant_cfg.clone()
    quiet.TEST.EVAL_PERIOD = 0
    quiet.DATASETS.TEST = ()
    quiet.OUTPUT_DIR = str(tmp_path / "quiet")
    (tmp_path / "quiet").mkdir()
    train(quiet)
    evaluated, straight = weights_of(output), weights_of(tmp_path / "quiet")
    assert all(torch.equal(evaluated[name], straight[name]) for name in straight)


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


def test_half_precision_trains_and_stays_finite(instant_cfg, output):
    instant_cfg.DATASETS.TEST = ()
    instant_cfg.CASCADE.AMP_DTYPE = "bfloat16"
    instant_cfg.SOLVER.MAX_ITER = 2
    instant_cfg.SOLVER.STEPS = ()
    train(instant_cfg)
    half = weights_of(output)
    instant_cfg.SOLVER.AMP.ENABLED = False
    instant_cfg.OUTPUT_DIR = str(output / "single")
    train(instant_cfg)
    single = weights_of(output / "single")
    name = "roi_heads.box_head.0.fc1.weight"
    assert half[name].dtype == torch.float32
    assert all(torch.isfinite(value).all() for value in half.values())
    assert not torch.equal(half[name], single[name])
    torch.testing.assert_close(half[name], single[name], atol=0.02, rtol=0)


def test_a_test_set_with_other_classes_is_refused(instant_cfg, shapes, tmp_path):
    content = json.loads((shapes / "val.json").read_text())
    names = [category["name"] for category in content["categories"]]
    for category, name in zip(content["categories"], reversed(names), strict=True):
        category["name"] = name
    (tmp_path / "turned.json").write_text(json.dumps(content))
    datasets = [list(d) for d in instant_cfg.CASCADE.DATASETS]
    datasets[1][1] = str(tmp_path / "turned.json")
    instant_cfg.CASCADE.DATASETS = datasets
    with pytest.raises(DatasetError, match=r"turned\.json has the classes ring, cross"):
        train(instant_cfg)


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


def test_a_resume_with_other_settings_says_which_and_uses_them(instant_cfg, output, caplog):
    instant_cfg.DATASETS.TEST = ()
    train(instant_cfg)
    (output / "last_checkpoint").write_text("model_0000002.pth")
    instant_cfg.SOLVER.BASE_LR = 0.5
    instant_cfg.SOLVER.BIAS_LR_FACTOR = 2.0
    with caplog.at_level("INFO"):
        train(instant_cfg, resume=True)
    assert "Resumed with another SOLVER.BASE_LR 0.0005 -> 0.5" in caplog.text
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert lines[-1]["lr"] > 0.01
    assert load_config(output / "config.yaml").SOLVER.BASE_LR == 0.5


def test_a_finished_run_says_so_and_is_not_overwritten(instant_cfg, output, caplog):
    instant_cfg.DATASETS.TEST = ()
    train(instant_cfg)
    before = (output / "model_final.pth").read_bytes()
    with pytest.raises(ConfigError, match=r"OUTPUT_DIR .*model_final\.pth.*--resume"):
        train(instant_cfg)
    (output / "model_final.pth").rename(output / "elsewhere.pth")
    with pytest.raises(ConfigError, match=r"model_0000005\.pth.*--resume"):
        train(instant_cfg)
    (output / "elsewhere.pth").rename(output / "model_final.pth")
    with caplog.at_level("INFO"):
        train(instant_cfg, resume=True)
    assert "all 6 iterations of SOLVER.MAX_ITER are done" in caplog.text
    assert (output / "model_final.pth").read_bytes() == before


def test_resuming_with_other_classes_is_refused(instant_cfg, output, shapes, tmp_path):
    instant_cfg.DATASETS.TEST = ()
    train(instant_cfg)
    content = json.loads((shapes / "train.json").read_text())
    content["categories"][0]["name"] = "blob"
    (tmp_path / "other.json").write_text(json.dumps(content))
    instant_cfg.CASCADE.DATASETS = [
        ["shapes_train", str(tmp_path / "other.json"), str(shapes / "train")]
    ]
    with pytest.raises(CheckpointError, match=r"checkpoint has the classes .*data have blob"):
        train(instant_cfg, resume=True)


def test_dropping_the_average_goes_on_with_the_trained_weights(instant_cfg, output):
    instant_cfg.DATASETS.TEST = ()
    instant_cfg.CASCADE.EMA_DECAY = 0.9
    train(instant_cfg)
    saved = torch.load(output / "model_final.pth", weights_only=True)
    name = "roi_heads.box_head.0.fc1.weight"
    assert not torch.equal(saved["model"][name], saved["training_weights"][name])
    instant_cfg.CASCADE.EMA_DECAY = 0.0
    instant_cfg.SOLVER.BASE_LR = 1e-12
    instant_cfg.SOLVER.MAX_ITER = 7
    train(instant_cfg, resume=True)
    torch.testing.assert_close(weights_of(output)[name], saved["training_weights"][name])
    # The weights are not kept twice from there on.
    assert "training_weights" not in torch.load(output / "model_final.pth", weights_only=True)


def test_accumulation_and_validation_loss_in_a_run(instant_cfg, output):
    instant_cfg.CASCADE.ACCUMULATION_STEPS = 2
    instant_cfg.CASCADE.VALIDATION_LOSS = True
    instant_cfg.CASCADE.BEST_METRIC = "validation/total_loss"
    instant_cfg.TEST.EVAL_PERIOD = 3
    results = train(instant_cfg)
    losses = results["validation"]
    assert losses["total_loss"] == pytest.approx(
        sum(value for name, value in losses.items() if name != "total_loss")
    )
    assert "loss_box_reg_stage2" in losses
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    values = [line["validation/total_loss"] for line in lines if "validation/total_loss" in line]
    assert len(values) == 2
    best = torch.load(output / "model_best.pth", weights_only=True)
    assert best["metric"]["validation/total_loss"] == min(values)


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

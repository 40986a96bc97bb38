"""Whole runs: what a key changes, what a resume keeps, and what is refused."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from coco_sets import edit_json, turn_names
from shape_runs import metrics_of, rates, saved
from small_backbones import M0, P3_TO_P7

from cascade_det.errors import CheckpointError, ConfigError, DatasetError
from cascade_det.standalone import Predictor

pytestmark = pytest.mark.usefixtures("no_pictures")

NO_TESTS = ("DATASETS.TEST", "()", "SOLVER.STEPS", "()")
ONE = ("SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()")
NAME = "roi_heads.box_head.0.fc1.weight"


def with_other_json(cfg, split, path, edit):
    """Let a configuration read an edited copy of the annotations of a data set."""
    datasets = {entry[0]: tuple(entry) for entry in cfg.CASCADE.DATASETS}
    _, json_file, images = datasets[f"shapes_{split}"]
    path.write_text(Path(json_file).read_text())
    edit_json(path, edit)
    # Under another name, since Detectron2 refuses other files under a registered one.
    datasets[f"own_{split}"] = (f"own_{split}", str(path), images)
    cfg.CASCADE.DATASETS = list(datasets.values())
    cfg.DATASETS["TRAIN" if split == "train" else "TEST"] = (f"own_{split}",)


class TestKeys:
    def test_evaluating_on_the_way_changes_no_weight(self, host, make_cfg):
        keys = ("SOLVER.MAX_ITER", "2", "INPUT.MIN_SIZE_TRAIN", "(40, 48, 56, 64, 72, 80)")
        often = ("TEST.EVAL_PERIOD", "1", "CASCADE.VALIDATION_LOSS", "True", "SOLVER.STEPS", "()")
        evaluated, quiet = make_cfg(*keys, *often), make_cfg(*keys, *NO_TESTS, output="quiet")
        host.train(evaluated)
        host.train(quiet)
        ours, theirs = saved(evaluated)["model"], saved(quiet)["model"]
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []

    def test_fixed_statistics_of_norms_stay_as_they_began(self, host, make_cfg):
        levels = ("MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5', 'res6']")
        keys = (*map(str, (*M0, *P3_TO_P7)), *levels, "MODEL.EFFICIENTVIT.NORM_EVAL", "True")
        cfg = make_cfg(*keys, *ONE, *NO_TESTS)
        host.train(cfg)
        trunk = {n: x for n, x in saved(cfg)["model"].items() if "bottom_up" in n}
        for kind, start in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
            values = [x for name, x in trunk.items() if name.endswith(kind)]
            assert values
            assert all((x == start).all() for x in values)
        # Zeros at first, and trained.
        assert trunk["backbone.bottom_up.blocks1.0.mixer.m.attn.proj.1.bn.weight"].any()

    def test_another_seed_gives_other_weights(self, host, make_cfg):
        cfgs = [make_cfg(*ONE, *NO_TESTS, "SEED", seed, output=seed) for seed in ("1", "2")]
        for cfg in cfgs:
            host.train(cfg)
        one, other = (saved(cfg)["model"][NAME] for cfg in cfgs)
        assert not torch.equal(one, other)

    def test_epochs_are_the_length_of_a_run_and_of_its_resume(self, host, make_cfg, caplog):
        given = make_cfg(*NO_TESTS, "CASCADE.EPOCHS", "0.5")  # of six images, two at once
        host.train(given)
        assert saved(given)["iteration"] == 1
        recorded = host.load_config(f"{given.OUTPUT_DIR}/config.yaml")
        assert (recorded.CASCADE.EPOCHS, recorded.SOLVER.MAX_ITER) == (0.5, 2)
        for cfg in (given, recorded):
            caplog.clear()
            with caplog.at_level(logging.INFO):
                host.train(cfg, resume=True)
            assert "2 iterations x 2 images = 0.667 epochs of 6 images" in caplog.text
            assert "Resumed with another" not in caplog.text

    def test_several_test_sets_have_results_of_their_own(self, host, make_cfg):
        cfg = make_cfg(*ONE, "DATASETS.TEST", "('shapes_val', 'shapes_train')")
        results = host.train(cfg)
        assert list(results) == ["shapes_val", "shapes_train"]
        assert results["shapes_train"]["exits"]["images"] == 6
        assert Path(cfg.OUTPUT_DIR, "shapes_val", "results.json").is_file()

    def test_half_precision(self, host, make_cfg):
        losses, weights = [], []
        # All proposals: a sample of them would hang on their order, which rounding changes.
        every = ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "64")
        for more in (("CASCADE.AMP_DTYPE", "bfloat16"), ("SOLVER.AMP.ENABLED", "False")):
            cfg = make_cfg(*ONE, *NO_TESTS, *every, *more, output=more[1])
            host.train(cfg)
            losses.append(metrics_of(cfg.OUTPUT_DIR)[0]["total_loss"])
            weights.append(saved(cfg)["model"])
        half, single = losses
        assert half != single
        assert half == pytest.approx(single, rel=0.05)
        assert all(value.isfinite().all() for value in weights[0].values())
        assert weights[0][NAME].dtype == torch.float32
        assert not torch.equal(weights[0][NAME], weights[1][NAME])
        torch.testing.assert_close(weights[0][NAME], weights[1][NAME], atol=0.02, rtol=0)

    def test_accumulation_and_validation_loss(self, host, make_cfg):
        cfg = make_cfg(
            *("CASCADE.ACCUMULATION_STEPS", "2", "CASCADE.VALIDATION_LOSS", "True"),
            *("CASCADE.BEST_METRIC", "validation/total_loss", "TEST.EVAL_PERIOD", "2"),
            *("CASCADE.LOG_PERIOD", "2", "SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "()"),
        )
        losses = host.train(cfg)["validation"]
        assert losses["total_loss"] == pytest.approx(
            sum(value for name, value in losses.items() if name != "total_loss")
        )
        assert "loss_box_reg_stage2" in losses
        lines = metrics_of(cfg.OUTPUT_DIR)
        assert [line["iteration"] for line in lines if "total_loss" in line] == [1, 3]
        found = [x["validation/total_loss"] for x in lines if "validation/total_loss" in x]
        assert len(found) == 2
        assert saved(cfg, "model_best.pth")["metric"]["validation/total_loss"] == min(found)


class TestResuming:
    def test_settings_are_those_of_the_configuration(self, host, make_cfg, caplog):
        keys = (*NO_TESTS, "SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "1")
        host.train(make_cfg(*keys))
        cfg = make_cfg(*keys, "SOLVER.BASE_LR", "0.5", "SOLVER.BIAS_LR_FACTOR", "2.0")
        Path(cfg.OUTPUT_DIR, "last_checkpoint").write_text("model_0000002.pth")
        before = rates(cfg.OUTPUT_DIR)
        with caplog.at_level(logging.INFO):
            host.train(cfg, resume=True)
        assert "Resumed with another SOLVER.BASE_LR 0.0005 -> 0.5" in caplog.text
        assert caplog.text.count("Resumed with another") == 2
        assert rates(cfg.OUTPUT_DIR) == {**before, 3: pytest.approx(1000 * before[3])}
        assert host.load_config(f"{cfg.OUTPUT_DIR}/config.yaml").SOLVER.BASE_LR == 0.5

    def test_a_finished_run_says_so_and_is_not_overwritten(self, host, make_cfg, caplog):
        cfg = make_cfg(*NO_TESTS, "SOLVER.MAX_ITER", "3")
        host.train(cfg)
        final, elsewhere = (Path(cfg.OUTPUT_DIR, f"{name}.pth") for name in ("model_final", "x"))
        before = final.read_bytes()
        with pytest.raises(ConfigError, match=r"OUTPUT_DIR .*model_final\.pth.*--resume"):
            host.train(cfg)
        final.rename(elsewhere)
        with pytest.raises(ConfigError, match=r"model_0000002\.pth.*--resume"):
            host.train(cfg)
        elsewhere.rename(final)
        with caplog.at_level(logging.INFO):
            assert host.train(cfg, resume=True) == {}
        assert "all 3 iterations of SOLVER.MAX_ITER are done" in caplog.text
        assert final.read_bytes() == before

    def test_without_the_average_the_trained_weights_go_on(self, host, make_cfg):
        cfg = make_cfg(*NO_TESTS, "CASCADE.EMA_DECAY", "0.9", "SOLVER.MAX_ITER", "2")
        host.train(cfg)
        before = saved(cfg)
        assert not torch.equal(before["model"][NAME], before["training_weights"][NAME])
        more = ("CASCADE.EMA_DECAY", "0.0", "SOLVER.BASE_LR", "1e-12", "SOLVER.MAX_ITER", "3")
        cfg = make_cfg(*NO_TESTS, *more)
        host.train(cfg, resume=True)
        after = saved(cfg)
        torch.testing.assert_close(after["model"][NAME], before["training_weights"][NAME])
        assert "training_weights" not in after


class TestRefusals:
    def test_classes_must_agree(self, host, make_cfg, tmp_path):
        with pytest.raises(ConfigError, match=r"NUM_CLASSES is 4.*6 categories.*NUM_CLASSES 6"):
            host.train(make_cfg("MODEL.ROI_HEADS.NUM_CLASSES", "4"))
        cfg = make_cfg()
        with_other_json(cfg, "val", tmp_path / "turned.json", turn_names)
        with pytest.raises(DatasetError, match=r"turned\.json has the classes ring, cross"):
            host.train(cfg)

    def test_resuming_with_other_classes(self, host, make_cfg, tmp_path):
        cfg = make_cfg(*ONE, *NO_TESTS)
        host.train(cfg)

        def rename(content):
            content["categories"][0]["name"] = "blob"

        with_other_json(cfg, "train", tmp_path / "other.json", rename)
        with pytest.raises(CheckpointError, match=r"checkpoint has the classes .*data have blob"):
            host.train(cfg, resume=True)

    def test_missing_things_are_named(self, host, make_cfg, tmp_path):
        cfg = make_cfg("MODEL.WEIGHTS", str(tmp_path / "none.pth"))
        with pytest.raises(CheckpointError, match=r"none\.pth"):
            host.evaluate(cfg)
        cfg.MODEL.WEIGHTS = ""
        with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTS"):
            host.evaluate(cfg)
        with pytest.raises(CheckpointError, match="nothing to resume"):
            host.evaluate(cfg, resume=True)
        cfg.DATASETS.TRAIN = ()
        with pytest.raises(ConfigError, match=r"DATASETS\.TRAIN"):
            host.train(cfg)
        cfg.DATASETS.TEST = ()
        with pytest.raises(ConfigError, match=r"DATASETS\.TEST"):
            host.evaluate(cfg)
        cfg.DATASETS.TRAIN = ("shape_train",)
        with pytest.raises(DatasetError, match="shapes_train"):
            host.train(cfg)


@pytest.mark.parametrize("use", ["evaluate", "open_detector", "Predictor"])
class TestWeightsThatDetectNothing:
    @pytest.fixture
    def open_weights(self, use, host):
        if use != "Predictor":
            return getattr(host, use)
        if host.name == "detectron2":
            pytest.skip("the predictor is of the standalone host")
        return Predictor

    @pytest.fixture
    def cfg(self, make_cfg, tmp_path):
        return make_cfg("MODEL.WEIGHTS", str(tmp_path / "weights.pth"))

    def test_a_trunk(self, open_weights, cfg, build_model):
        state = build_model(cfg).state_dict()
        trunk = {k: v for k, v in state.items() if k.startswith("backbone.bottom_up.")}
        torch.save(trunk, cfg.MODEL.WEIGHTS)
        with pytest.raises(CheckpointError, match=r"MODEL\.WEIGHTS") as error:
            open_weights(cfg)
        assert "lacks the FPN (40 of 40 tensors), the RPN" in str(error.value)
        assert "the box heads" in str(error.value)

    @pytest.mark.parametrize(
        ("value", "name"),
        [
            (float("nan"), "proposal_generator.rpn_head.conv.bias"),
            (float("inf"), "roi_heads.box_predictor.1.bbox_pred.bias"),
        ],
    )
    def test_numbers_that_are_not_finite(self, open_weights, cfg, build_model, value, name):
        state = build_model(cfg).state_dict()
        state[name][0] = value
        torch.save(state, cfg.MODEL.WEIGHTS)
        with pytest.raises(CheckpointError, match=f"weights.pth: holds NaN or Inf in {name}"):
            open_weights(cfg)


def test_evaluation_repeats_the_metrics_of_the_training(host, make_cfg):
    keys = (*ONE, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
    cfg = make_cfg(*keys)
    trained = host.train(cfg)
    weights = ("MODEL.WEIGHTS", f"{cfg.OUTPUT_DIR}/model_final.pth")
    batches = ("CASCADE.TEST_IMS_PER_BATCH", "2")
    again = host.evaluate(make_cfg(*keys, *weights, *batches, output="again"))
    resumed = host.evaluate(make_cfg(*keys), resume=True)
    for results in (again, resumed):
        assert results["bbox"] == pytest.approx(trained["bbox"], nan_ok=True, abs=1e-6)
        found, wanted = results["stages"]["stage2"], trained["stages"]["stage2"]
        assert found == pytest.approx(wanted, nan_ok=True, abs=1e-6)
    # In their last digits, scores depend on what else is in a batch.
    exits = [json.loads(json.dumps(results["exits"])) for results in (trained, again)]
    for stages in exits:
        for stage in range(3):
            assert all(0 < x < 1 for x in stages[f"stage{stage}"].pop("mean_score").values())
    assert exits[0] == exits[1]


def test_augmentation_is_evaluated_after_a_training_and_alone(host, make_cfg, caplog):
    keys = (
        *(*ONE, "TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64,)"),
        *("TEST.AUG.MAX_SIZE", "128", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
    )
    two_sets = ("DATASETS.TEST", "('shapes_val', 'shapes_train')")
    cfg = make_cfg(*keys, *two_sets, "CASCADE.EMA_DECAY", "0.5")
    trained = host.train(cfg)
    assert list(trained) == ["shapes_val", "shapes_train"]
    weights = ("MODEL.WEIGHTS", f"{cfg.OUTPUT_DIR}/model_final.pth")
    alone = make_cfg(*keys, *weights, output="alone")
    with caplog.at_level(logging.INFO):
        results = host.evaluate(alone)
    for folder, found in ((f"{cfg.OUTPUT_DIR}/shapes_val", trained["shapes_val"]), ("", results)):
        assert found["bbox_TTA"]["AP"] >= 0
        assert found["bbox_TTA"] == pytest.approx(results["bbox_TTA"], nan_ok=True, abs=1e-6)
        written = json.loads(Path(folder or alone.OUTPUT_DIR, "results.json").read_text())
        assert written["bbox_TTA"]["AP"] == pytest.approx(found["bbox_TTA"]["AP"])
        assert {"bbox", "stages", "latency", "machine"} <= written.keys()
    assert "Results on shapes_val with test-time augmentation:" in caplog.text
    assert "Box AP with augmentation" in caplog.text


def test_classes_are_scored_by_their_frequency(host, make_cfg):
    pytest.importorskip("faster_coco_eval")
    options = ("SOLVER.STEPS", "()", "SOLVER.MAX_ITER", "1")
    cfg = make_cfg(*options, "CASCADE.LVIS_AP", "True", "CASCADE.FAST_AP", "True")
    results = host.train(cfg)
    assert results["lvis"].keys() == {"AP", "APr", "APc", "APf"}
    # Every class is in fewer than 11 images.
    assert results["lvis"]["APr"] == pytest.approx(results["bbox"]["AP"], abs=0.05)
    assert math.isnan(results["lvis"]["APf"])
    assert results["stages"]["stage2"]["AP"] >= 0

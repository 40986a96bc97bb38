"""What a configuration can ask of a run in Detectron2: solver, evaluation, other models."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from shape_runs import metrics_of, saved

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from cascade_det.d2 import host
from cascade_det.d2.datasets import register_dataset
from cascade_det.d2.loader import build_train_loader
from cascade_det.engine.step import TrainingStep

pytestmark = [pytest.mark.needs_detectron2, pytest.mark.usefixtures("no_pictures")]

NO_TESTS = ("DATASETS.TEST", "()")
ONE = ("SOLVER.MAX_ITER", "1")
TWO = ("SOLVER.MAX_ITER", "2")
NO_EXITS = ("MODEL.CASCADE.EXIT.ENABLED", "False")
OWN_CASCADE = (*NO_EXITS, "MODEL.ROI_HEADS.NAME", "CascadeROIHeads")
STANDARD = (*NO_EXITS, "MODEL.ROI_HEADS.NAME", "StandardROIHeads")
NAME = "roi_heads.box_head.0.fc1.weight"


class TestSolver:
    @pytest.mark.parametrize(
        ("name", "memory"), [("SGD", {"momentum_buffer"}), ("AdamW", {"exp_avg", "exp_avg_sq"})]
    )
    def test_the_optimiser_is_the_one_that_is_asked_for(self, make_cfg, name, memory):
        cfg = make_cfg(*ONE, *NO_TESTS, "CASCADE.OPTIMIZER", name)
        host.train(cfg)
        optimizer = saved(cfg)["trainer"]["_trainer"]["optimizer"]
        assert optimizer["type"] == name
        assert memory <= optimizer["state"][NAME].keys()

    def test_gradients_are_clipped(self, make_cfg, on_step):
        """With a rate of 1 and nothing else, a step is as long as the gradient may be."""
        weights = {}
        cfg = make_cfg(
            *(*ONE, *NO_TESTS, "CASCADE.OPTIMIZER", "SGD", "SOLVER.BASE_LR", "1.0"),
            *("SOLVER.WARMUP_FACTOR", "1.0", "SOLVER.WARMUP_ITERS", "0", "SOLVER.MOMENTUM", "0.0"),
            *("SOLVER.WEIGHT_DECAY", "0.0", "SOLVER.CLIP_GRADIENTS.ENABLED", "True"),
            *("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"),
            *("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.125"),
        )
        on_step(lambda *_: weights.update(saved(cfg, "model_start.pth")["model"]))
        host.train(cfg)
        after = saved(cfg)["model"]
        trained = [name for name, _ in build_model(cfg).named_parameters()]
        steps = torch.cat([(after[name] - weights[name]).flatten() for name in trained])
        assert steps.double().norm().item() == pytest.approx(0.125, rel=1e-3)

    def test_a_batch_in_parts_has_the_gradients_of_the_whole(self, make_cfg):
        """Of one image twice, so that no mean over regions depends on how they are parted."""
        cfg = make_cfg(
            *("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "", "INPUT.RANDOM_FLIP", "none"),
            # Everything is sampled: nothing is drawn.
            *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "100000", "MODEL.RPN.POSITIVE_FRACTION", "1.0"),
            *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "1000"),
            *("MODEL.ROI_HEADS.POSITIVE_FRACTION", "1.0"),
        )
        register_dataset("shapes_train", cfg.CASCADE.DATASETS)
        first, _ = next(iter(build_train_loader(cfg)))
        gradients = []
        for parts in (1, 2):
            torch.manual_seed(0)
            model = build_model(cfg).train()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            step = TrainingStep(model, optimizer, accumulation_steps=parts, metrics=dict)
            with EventStorage():
                step.run([first, first], 0)
            gradients.append({name: p.grad for name, p in model.named_parameters()})
        whole, in_parts = gradients
        assert whole[NAME].abs().max() > 1e-4
        for name, gradient in whole.items():
            torch.testing.assert_close(in_parts[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_and_without_a_folder(make_cfg, caplog):
    cfg = make_cfg(*ONE, *NO_TESTS, "MODEL.DEVICE", "cuda")
    cfg.OUTPUT_DIR = f"{cfg.OUTPUT_DIR}/not/there"
    host.train(cfg)
    assert "MODEL.DEVICE is cuda, but no GPU is available" in caplog.text
    assert saved(cfg)["iteration"] == 0


class TestModels:
    @pytest.mark.parametrize("heads", [OWN_CASCADE, STANDARD])
    def test_models_without_our_heads(self, make_cfg, heads, caplog):
        cfg = make_cfg(*heads, *ONE, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
        with caplog.at_level(logging.INFO):
            results = host.train(cfg)
        assert "The model does not use our heads: no metrics per stage" in caplog.text
        assert results["bbox"]["AP"] >= 0
        assert "stages" not in results
        assert list(results["latency"]["parts"]) == ["model"]
        expected = "loss_cls_stage2" if heads == OWN_CASCADE else "loss_cls"
        assert expected in metrics_of(cfg.OUTPUT_DIR)[0]

    def test_our_heads_without_exits(self, make_cfg):
        exits = host.train(make_cfg(*ONE, *NO_EXITS))["exits"]
        assert exits["stage0"]["entered"] == exits["stage2"]["entered"] > 0

    @pytest.mark.parametrize(
        ("threshold", "annotated", "ap"), [("0.999", True, 0.0), ("0.0", False, math.nan)]
    )
    def test_nothing_found_and_nothing_to_find(
        self, make_cfg, shapes, tmp_path, threshold, annotated, ap
    ):
        content = json.loads((shapes / "val.json").read_text())
        if not annotated:
            content["annotations"].clear()
        (tmp_path / "own.json").write_text(json.dumps(content))
        cfg = make_cfg(*ONE, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", threshold)
        train, _ = cfg.CASCADE.DATASETS
        own = ("shapes_own", str(tmp_path / "own.json"), str(shapes / "val"))
        cfg.CASCADE.DATASETS, cfg.DATASETS.TEST = (train, own), ("shapes_own",)
        results = host.train(cfg)
        assert results["bbox"]["AP"] == pytest.approx(ap, nan_ok=True)
        assert len(results["bbox"]) == 7 + 6
        assert any("AP is" in note for note in results["notes"])


class TestDetectron2sOwn:
    def test_precise_statistics_of_norms(self, make_cfg):
        """Of the averaged weights, which are those that detect."""
        keys = (*ONE, *NO_TESTS, "CASCADE.EMA_DECAY", "0.5")
        precise = ("TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "2")
        cfgs = make_cfg(*keys), make_cfg(*keys, *precise, output="precise")
        for cfg in cfgs:
            host.train(cfg)
        usual, better = (saved(cfg)["model"] for cfg in cfgs)
        changed = {name for name in usual if not torch.equal(usual[name], better[name])}
        assert changed == {n for n in usual if "running" in n or "tracked" in n}

    def test_pictures_of_training(self, make_cfg):
        accumulator = pytest.importorskip(
            "tensorboard.backend.event_processing.event_accumulator", exc_type=ImportError
        )
        cfg = make_cfg(*TWO, *NO_TESTS, "VIS_PERIOD", "1")
        host.train(cfg)
        (file,) = Path(cfg.OUTPUT_DIR).glob("events.out.tfevents.*")
        events = accumulator.EventAccumulator(str(file), size_guidance={"images": 0})
        events.Reload()
        (tag,) = events.Tags()["images"]
        assert "Predicted proposals" in tag
        assert [event.step for event in events.Images(tag)] == [0, 1]

    def test_without_tensorboard(self, make_cfg, monkeypatch, caplog):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        cfg = make_cfg(*ONE, *NO_TESTS)
        with caplog.at_level(logging.INFO):
            host.train(cfg)
        assert "tensorboard is missing" in caplog.text
        assert not list(Path(cfg.OUTPUT_DIR).glob("events.out.tfevents.*"))

    def test_readers_in_processes_of_their_own(self, make_cfg):
        """Images of training in another order, those of a test in the same."""
        keys = (*ONE, "DATALOADER.NUM_WORKERS", "2", "CASCADE.TEST_IMS_PER_BATCH", "2")
        cfg = make_cfg(*keys, "CASCADE.VALIDATION_LOSS", "True")
        results = host.train(cfg)
        cfg.MODEL.WEIGHTS = f"{cfg.OUTPUT_DIR}/model_final.pth"
        cfg.DATALOADER.NUM_WORKERS = 0
        again = host.evaluate(cfg)
        assert again["bbox"] == pytest.approx(results["bbox"], nan_ok=True)
        assert again["exits"]["images"] == 3

"""Runs of segmenters in Detectron2, compared with the standalone host on the same configuration."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from shape_runs import ROOT, assert_same, metrics_of, saved
from small_segmenter import CLASSES, labelled, squares_run, write_squares

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.data.datasets import load_sem_seg
from detectron2.evaluation import SemSegEvaluator, inference_on_dataset
from detectron2.modeling import build_model

from cascade_det.config.tree import changed
from cascade_det.core import PartTimer
from cascade_det.d2 import host
from cascade_det.d2.segmenter import Segmenter
from cascade_det.d2.semantic_datasets import find_registered
from cascade_det.errors import CheckpointError, ConfigError, DatasetError
from cascade_det.hosts import load_host
from cascade_det.standalone import host as standalone_host
from cascade_det.standalone.build_segmenter import build_segmenter

pytestmark = pytest.mark.needs_detectron2

SAVING = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "CASCADE.LOG_PERIOD", 1)
SAVING += ("CASCADE.VALIDATION_LOSS", True, "CASCADE.EMA_DECAY", 0.5)
PARTS = ("preprocess", "backbone", *(f"stage{i}" for i in range(4)), "postprocess", "total")


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squares")
    write_squares(folder)
    return folder


@pytest.fixture(scope="module")
def make(squares):
    """``make(folder, *options, host=host)``: a checked configuration with output in a folder."""

    def configured(folder, *options, host=host):
        cfg = host.load_config([], [*squares_run(squares), "OUTPUT_DIR", str(folder), *options])
        host.check_config(cfg)
        return cfg

    return configured


@pytest.fixture(scope="module")
def runs(make, tmp_path_factory):
    """Configuration and results of the same training in each host."""
    found = {}
    for name in ("detectron2", "standalone"):
        of = load_host(name)
        cfg = make(tmp_path_factory.mktemp(name), *SAVING, host=of)
        found[name] = cfg, of.train(cfg)
    return found


def test_a_training_is_the_same_in_both_hosts(runs):
    (ours, results), (alone, wanted) = runs["detectron2"], runs["standalone"]
    logged, expected = (
        [
            (key, value)
            for line in metrics_of(cfg.OUTPUT_DIR)
            for key, value in sorted(line.items())
            if "loss" in key or key == "lr" or key.startswith("sem_seg/")
        ]
        for cfg in (ours, alone)
    )
    assert [key for key, _ in logged] == [key for key, _ in expected]
    assert [key for key, _ in logged].count("loss_sem_seg") == 4
    assert dict(logged)["validation/loss_sem_seg"] > 0
    for (key, value), (_, other) in zip(logged, expected, strict=True):
        assert value == pytest.approx(other, rel=1e-5, nan_ok=True), key
    assert_close(saved(ours)["model"], saved(alone)["model"])
    assert results["sem_seg"] == pytest.approx(wanted["sem_seg"], abs=0.1)
    assert tuple(results["latency"]["parts"]) == PARTS[:-1]


def assert_close(state, wanted):
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


def test_both_hosts_leave_the_same_files(runs):
    files = {
        name: {p.name for p in Path(cfg.OUTPUT_DIR).rglob("*") if "tfevents" not in p.name}
        for name, (cfg, _) in runs.items()
    }
    assert files["detectron2"] == files["standalone"]
    assert files["detectron2"] >= {"model_final.pth", "model_best.pth", "results.json"}
    written = json.loads((Path(runs["detectron2"][0].OUTPUT_DIR) / "results.json").read_text())
    assert written.keys() >= {"sem_seg", "latency", "machine"}


def test_a_resumed_run_is_the_same_run(runs, make, tmp_path):
    """Its images are those that the run would have had."""
    wanted, _ = runs["detectron2"]
    for name in ("model_0000001.pth", "config.yaml"):
        (tmp_path / name).write_bytes(Path(wanted.OUTPUT_DIR, name).read_bytes())
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    cfg = make(tmp_path, *SAVING, "CASCADE.VALIDATION_LOSS", False, "DATASETS.TEST", ())
    host.train(cfg, resume=True)
    for entry in ("model", "training_weights"):
        assert_same(saved(cfg)[entry], saved(wanted)[entry])
    with pytest.raises(CheckpointError, match="trained by --host detectron2"):
        standalone_host.train(cfg, resume=True)


def test_weights_of_either_host_give_the_same_results_in_the_other(runs, make, tmp_path):
    for trained, of in (("detectron2", standalone_host), ("standalone", host)):
        cfg, wanted = runs[trained]
        weights = str(Path(cfg.OUTPUT_DIR, "model_final.pth"))
        found = of.evaluate(make(tmp_path / trained, "MODEL.WEIGHTS", weights, host=of))
        assert found["sem_seg"] == pytest.approx(wanted["sem_seg"], abs=0.05)


@pytest.fixture
def registered(squares):
    """The data set as a user of Detectron2 registers it."""
    images, labels = str(squares / "images"), str(squares / "labels")
    DatasetCatalog.register("theirs", lambda: load_sem_seg(labels, images, image_ext="png"))
    metadata = MetadataCatalog.get("theirs")
    metadata.set(image_root=images, sem_seg_root=labels, evaluator_type="sem_seg")
    return metadata.set(stuff_classes=CLASSES, ignore_label=255)


def test_registered_sets_are_evaluated_as_detectron2_does(runs, make, tmp_path, registered):
    weights = str(Path(runs["detectron2"][0].OUTPUT_DIR, "model_final.pth"))
    cfg = make(tmp_path, "DATASETS.TEST", ("theirs",), "MODEL.WEIGHTS", weights)
    found = host.evaluate(cfg)["sem_seg"]
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(weights, weights_only=True)["model"])
    loader = build_detection_test_loader(cfg, "theirs")
    evaluator = SemSegEvaluator("theirs", distributed=False, output_dir=None)
    wanted = inference_on_dataset(model, loader, evaluator)["sem_seg"]
    assert found.keys() >= {"mIoU", "pACC", "IoU-dark", "ACC-dark"}
    assert found == pytest.approx({name: wanted[name] for name in found}, nan_ok=True)


def test_volumes_have_the_same_metrics_in_both_hosts(make, tmp_path):
    random = np.random.default_rng(0)
    image = random.random((3, 48, 40), np.float32)
    label = random.integers(0, 4, image.shape).astype(np.uint8)
    (tmp_path / "volumes").mkdir()
    np.savez(tmp_path / "volumes" / "patient001.npz", img=image, label=label)
    options = ["CASCADE.SEMANTIC_DATASETS", [["hearts", "acdc", str(tmp_path / "volumes")]]]
    options += ["DATASETS.TEST", ("hearts",), "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 4]
    options += ["MODEL.WEIGHTS", str(tmp_path / "weights.pth")]
    cfg = make(tmp_path / "output", *options)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "weights.pth")
    ours = host.evaluate(cfg)
    alone = standalone_host.evaluate(make(tmp_path / "alone", *options, host=standalone_host))
    assert {"volumes", "volumes_strict"} <= ours.keys()
    for name in ("sem_seg", "volumes", "volumes_strict"):
        assert json.dumps(ours[name]) == json.dumps(alone[name])


RECIPES = ("SemanticSegmentation/cascade_resnet50", "SemanticSegmentation/cascade_pvtv2_b2")


@pytest.mark.parametrize("recipe", [*RECIPES, "quick_schedules/segment_shapes"])
def test_recipes_are_for_both_hosts(recipe):
    cfg = host.load_config(str(ROOT / "configs" / f"{recipe}.yaml"))
    host.check_config(cfg)


def register(name, **metadata):
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(**metadata)


def test_registered_sets_that_cannot_be_read_are_named(make, squares, tmp_path):
    folders = {"image_root": str(squares / "images"), "sem_seg_root": str(squares / "labels")}
    register("bare", **folders)
    register("other", **folders, stuff_classes=CLASSES, ignore_label=254)
    gone = {**folders, "sem_seg_root": str(squares / "gone")}
    register("gone", **gone, stuff_classes=CLASSES)
    register("squares", **gone, stuff_classes=CLASSES)
    for name, message in (
        ("bare", "its metadata needs image_root, sem_seg_root, stuff_classes"),
        ("other", "with ignore_label 254, but MODEL.SEM_SEG_HEAD.IGNORE_VALUE is 255"),
        ("gone", "gone, of which one is missing.*DETECTRON2_DATASETS"),
        ("unknown", "Declare it in CASCADE.SEMANTIC_DATASETS"),
    ):
        with pytest.raises(DatasetError, match=message):
            host.train(make(tmp_path, "DATASETS.TRAIN", (name,)))
    # A declared set goes before a registered one.
    own = make(tmp_path).CASCADE.SEMANTIC_DATASETS
    assert find_registered("squares", own, class_names=CLASSES).folder == squares / "images"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("MODEL.SEM_SEG_HEAD.NAME", "CascadeHead"), "'CascadeHead', which is not registered"),
        (("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2", "p3"]), r"neighbouring levels.*'res2'"),
        (("MODEL.CASCADE_DECODER.FUSE", "sum"), r"FUSE is 'sum'"),
        (("INPUT.CROP.ENABLED", True), r"CROP\.ENABLED is True, but segmenters do not.*to False"),
        (
            ("CASCADE.AUGMENT", (["JPEG"],)),
            r"CASCADE\.AUGMENT is .*JPEG.*segmenters do not have that",
        ),
        (
            ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
            r"segmenters do not have that.*'TrainingSampler'",
        ),
        (("TEST.AUG.ENABLED", True), "segmenters do not have that"),
        (("SOLVER.BASE_LR", -1.0), r"SOLVER\.BASE_LR is -1"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_bad_keys_are_named(make, tmp_path, options, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        make(tmp_path, *options)


def test_a_segmenter_is_no_detector(make, tmp_path):
    with pytest.raises(ConfigError, match="for detectors"):
        host.open_detector(make(tmp_path, "MODEL.WEIGHTS", "weights.pth"))


def test_a_diverged_batch_is_replayed_in_either_host(make, tmp_path):
    cfg = make(tmp_path, "SOLVER.BASE_LR", 1e30, "SOLVER.WARMUP_ITERS", 0, "DATASETS.TEST", ())
    with pytest.raises(FloatingPointError, match="--replay-batch"):
        host.train(cfg)
    (file,) = tmp_path.glob("diverged_*.pth")
    step = torch.load(file, weights_only=True)
    step["batch"][0]["sem_seg"][0, 0] = 3
    torch.save(step, tmp_path / "other.pth")
    for of in (host, standalone_host):
        again = make(tmp_path / "again", host=of)
        report = of.replay_batch(again, file)
        assert any(line.startswith("outputs that are not finite: backbone") for line in report)
        with pytest.raises(CheckpointError, match="labels of image 0 of the batch are not int64"):
            of.replay_batch(again, tmp_path / "other.pth")


class TestSegmenter:
    @pytest.fixture
    def batch(self):
        torch.manual_seed(0)
        return [labelled(75, 90, height=150, width=200), labelled(64, 101)]

    def test_in_parts_it_is_the_model(self, make, tmp_path, batch):
        model = build_model(make(tmp_path))
        segmenter = Segmenter(model).train()
        timer = PartTimer()
        found = segmenter.segment(batch, timer=timer)
        assert tuple(timer.milliseconds) == PARTS[:-1]
        assert found.stats.left == [{}, {}, {}, {"completed": 2}]
        assert all(module.training for module in model.modules())
        with torch.no_grad():
            wanted = model.eval()(batch)
        for ours, theirs in zip(found.sem_seg, wanted, strict=True):
            assert torch.equal(ours, theirs["sem_seg"])
        assert segmenter.segment([]).sem_seg == []
        with pytest.raises(ValueError, match="image 0 of the batch"):
            segmenter.segment([{"image": torch.zeros(5, 5)}])

    @pytest.mark.parametrize("kind", ["image", "patch"])
    def test_exits_decide_as_in_the_standalone_host(self, make, tmp_path, batch, kind):
        exits = ("MODEL.CASCADE_DECODER.EXIT.KIND", kind, "MODEL.CASCADE_DECODER.EXIT.PATCH", 4)
        exits += ("MODEL.CASCADE_DECODER.EXIT.ENABLED", True)
        exits += ("MODEL.CASCADE_DECODER.EXIT.THRESHOLDS", [0.7, 0.9, 2.0])
        model = build_model(make(tmp_path, *exits))
        with torch.no_grad():
            for head in model.sem_seg_head.heads:
                head.weight *= 300  # decisions that differ
        alone = build_segmenter(make(tmp_path, *exits, host=standalone_host))
        alone.load_state_dict(model.state_dict())
        ours, theirs = (x.segment(batch, levels=True) for x in (Segmenter(model), alone))
        assert ours.stats.left == theirs.stats.left
        assert sum(left.get("confident", 0) for left in ours.stats.left) > 0
        for name in ("sem_seg", "levels"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))

    def test_losses_leave_norms_alone(self, make, tmp_path, batch):
        model = build_model(make(tmp_path)).eval()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        ((name, loss),) = Segmenter(model).losses(batch).items()
        assert name == "loss_sem_seg"
        assert loss > 0
        assert_same(dict(model.state_dict()), before)
        assert not any(module.training for module in model.modules())

    def test_a_head_of_detectron2_runs_as_a_whole(self, make, tmp_path):
        head = ("MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead", "MODEL.SEM_SEG_HEAD.NORM", "")
        pyramid = ("MODEL.BACKBONE.NAME", "build_mobilenet_v2_fpn_backbone")
        maps = ("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"])
        names = ("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2", "p3", "p4", "p5"])
        cfg = make(tmp_path, *head, *pyramid, *maps, *names, "SOLVER.MAX_ITER", 1)
        results = host.train(cfg)
        assert 0 <= results["sem_seg"]["pACC"] <= 100
        assert tuple(results["latency"]["parts"]) == ("model",)
        cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
        with pytest.raises(ConfigError, match="'SemSegFPNHead': a model without our head"):
            host.open_segmenter(cfg)
        for key, value in (("CASCADE_DECODER.EXIT.ENABLED", True), ("DUAL_SCALE.MODE", "cascaded")):
            with pytest.raises(ConfigError, match=f"MODEL.{key}: set, but .* does not read them"):
                host.check_config(changed(cfg, f"MODEL.{key}", value))

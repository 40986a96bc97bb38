"""The heads inside what users of Detectron2 have around a model: the real thing, nothing mocked."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import AMPTrainer, DefaultPredictor, DefaultTrainer, hooks
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling import ROI_HEADS_REGISTRY, GeneralizedRCNNWithTTA, build_model
from detectron2.solver import build_optimizer
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from detectron2.utils.visualizer import Visualizer
from small_cascades import make_scene
from small_plugin import (
    CONFIGS,
    EXITS,
    MASKS,
    OURS,
    SAME_KERNEL,
    THEIRS,
    assert_same_instances,
    build_detector,
    detect,
    detectron2_yaml,
    features_of,
    keep_in_range,
    make_image,
    model_cfg,
    proposals_of,
    targets_of,
    twins,
)

from cascade_det.d2 import EarlyExitCascadeROIHeads, add_cascade_config

pytestmark = pytest.mark.needs_detectron2


@pytest.fixture(scope="module")
def data(shapes):
    """Options of a configuration that name a small data set."""
    for split in ("train", "val"):
        name = f"plug_shapes_{split}"
        register_coco_instances(name, {}, str(shapes / f"{split}.json"), str(shapes / split))
    return [
        *("DATASETS.TRAIN", ("plug_shapes_train",), "DATASETS.TEST", ("plug_shapes_val",)),
        *("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 128),
        *("TEST.AUG.MIN_SIZES", (64, 80), "TEST.AUG.MAX_SIZE", 160),
    ]


def models(options, **changes):
    """Configuration and model, with ours and with Detectron2's own heads, of the same weights."""
    ours, theirs = (
        (cfg, build_detector(cfg))
        for cfg in (model_cfg(OURS, [*options, *SAME_KERNEL]), model_cfg(THEIRS, options))
    )
    ours[1].load_state_dict(theirs[1].state_dict())
    return ours, theirs


def picture(size, seed=0):
    """BGR, uint8 ``[H, W, 3]``, as OpenCV reads it."""
    return make_image(size, seed=seed).permute(1, 2, 0).to(torch.uint8).numpy()


class TestInference:
    def test_predictor(self, data, tmp_path):
        cfg = model_cfg(options=[*data, *EXITS])
        model = build_detector(cfg)
        DetectionCheckpointer(model, str(tmp_path)).save("model")
        cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
        image = picture((64, 100))
        found = DefaultPredictor(cfg)(image)["instances"]
        assert found.image_size == (64, 100)
        assert set(found.get_fields()) == {"pred_boxes", "scores", "pred_classes", "exit_stages"}
        assert len(set(found.exit_stages.tolist())) > 1
        inputs = {"image": torch.from_numpy(image.transpose(2, 0, 1).astype("float32"))}
        with torch.no_grad():
            wanted = model([inputs])[0]["instances"]
        assert_same_instances([found], [wanted])

    def test_evaluator(self, data, tmp_path):
        results, files = [], []
        for name, (cfg, model) in zip(("ours", "theirs"), models(data), strict=True):
            evaluator = COCOEvaluator("plug_shapes_val", output_dir=str(tmp_path / name))
            loader = build_detection_test_loader(cfg, "plug_shapes_val")
            results.append(inference_on_dataset(model, loader, evaluator)["bbox"])
            files.append(json.loads((tmp_path / name / "coco_instances_results.json").read_text()))
        assert len(files[0]) > 20
        assert files[0] == files[1]
        assert results[0] == pytest.approx(results[1], nan_ok=True)
        assert "AP50" in results[0]

    @pytest.mark.parametrize("masks", [[], MASKS], ids=["boxes", "masks"])
    def test_test_time_augmentation(self, data, masks):
        (cfg, model), (their_cfg, their_model) = models([*data, *masks])
        inputs = {"image": make_image((64, 100)), "height": 64, "width": 100}
        with torch.no_grad():
            found, wanted = (
                GeneralizedRCNNWithTTA(*pair)([copy.copy(inputs)])[0]["instances"]
                for pair in ((cfg, model), (their_cfg, their_model))
            )
        assert len(found) > 5
        assert_same_instances([found], [wanted])
        # It builds Instances of its own.
        assert not found.has("exit_stages")
        assert "GeneralizedRCNNWithTTA" in EarlyExitCascadeROIHeads.__doc__

    def test_visualizer(self, data):
        cfg = model_cfg(options=[*data, *EXITS, *MASKS])
        image = picture((96, 128))
        with torch.no_grad():
            inputs = {"image": make_image((96, 128)), "height": 96, "width": 128}
            found = build_detector(cfg)([inputs])[0]["instances"]
        assert found.has("pred_masks")
        metadata = MetadataCatalog.get("plug_shapes_val").set(
            thing_classes=["circle", "square", "triangle", "star", "cross", "ring"]
        )
        drawn = Visualizer(image, metadata).draw_instance_predictions(found[:3]).get_image()
        assert drawn.shape == image.shape
        assert not np.array_equal(drawn, image)


class Trainer(DefaultTrainer):
    """As Detectron2's documentation has it: only the evaluator is named."""

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)


def training_options(data, folder, **changes):
    keys = {
        "OUTPUT_DIR": str(folder),
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.BASE_LR": 1e-3,
        "SOLVER.MAX_ITER": 4,
        "SOLVER.STEPS": (),
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "TEST.EVAL_PERIOD": 2,
        "SEED": 1,
    } | changes
    return [*data, *(item for pair in keys.items() for item in pair)]


def scalars(folder):
    """The last value of everything in the metrics file."""
    merged = {}
    for line in (Path(folder) / "metrics.json").read_text().splitlines():
        merged |= json.loads(line)
    return merged


class TestTraining:
    def test_trainer_with_its_hooks_and_resume(self, data, tmp_path):
        pytest.importorskip("tensorboard")  # one of Detectron2's writers
        options = training_options(data, tmp_path)
        trainer = Trainer(model_cfg(options=[*options, *EXITS]))
        trainer.resume_or_load(resume=False)
        before = copy.deepcopy(trainer.model.roi_heads.state_dict())
        trainer.train()
        assert "bbox/AP" in trainer.storage.latest()
        after = trainer.model.roi_heads.state_dict()
        # Every layer of every stage has learnt.
        assert not any(torch.equal(after[name], before[name]) for name in before)
        logged = scalars(tmp_path)
        for stage in range(3):
            assert logged[f"loss_cls_stage{stage}"] > 0
            assert logged[f"stage{stage}/roi_head/num_bg_samples"] > 0
        # Of the evaluation, which ran in the middle of the training.
        assert 0 <= logged["stage0/exit_rate"] <= 1
        files = {path.name for path in tmp_path.glob("model_*.pth")}
        assert files == {"model_0000001.pth", "model_0000003.pth", "model_final.pth"}

        longer = training_options(data, tmp_path, **{"SOLVER.MAX_ITER": 5})
        resumed = Trainer(model_cfg(options=[*longer, *EXITS]))
        resumed.resume_or_load(resume=True)
        assert resumed.start_iter == 4
        for name, value in resumed.model.roi_heads.state_dict().items():
            assert torch.equal(value, after[name]), name
        resumed.train()
        final = torch.load(tmp_path / "model_final.pth", weights_only=False)
        assert final["iteration"] == 4

    def test_precise_bn(self):
        options = ["MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN"]
        options += ["MODEL.ROI_BOX_HEAD.NUM_CONV", 1, "MODEL.ROI_BOX_HEAD.CONV_DIM", 8]
        options += ["MODEL.ROI_BOX_HEAD.NORM", "BN"]
        batches = [[trained_sample(seed), trained_sample(seed + 1)] for seed in (0, 2)]
        statistics = []
        for _, model in models(options):
            hook = hooks.PreciseBN(1, model.train(), batches, num_iter=2)
            torch.manual_seed(5)
            hook.update_stats()
            statistics.append({k: v for k, v in model.state_dict().items() if "running" in k})
        ours, theirs = statistics
        assert any("box_head.2" in name for name in ours)
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name
            assert bool((value != value.new_tensor("var" in name)).any()), name

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
    def test_amp_trainer(self, precision):
        cfg = model_cfg(options=[*EXITS, "MODEL.DEVICE", "cuda", "SOLVER.BASE_LR", 1e-4])
        model = build_detector(cfg).train()
        before = copy.deepcopy(model.state_dict())
        batches = [[trained_sample(seed), trained_sample(seed + 1)] for seed in range(8)]
        trainer = AMPTrainer(
            model, batches, build_optimizer(cfg, model), precision=precision, log_grad_scaler=True
        )
        losses = []
        trainer.register_hooks([Recorder(losses)])
        trainer.train(0, len(batches))
        assert len(losses) == len(batches)
        assert all(np.isfinite(losses))
        changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
        assert any("box_predictor.2.cls_score" in name for name in changed)
        with torch.no_grad(), torch.autocast("cuda", precision):
            found = model.eval()([{"image": make_image((96, 128))}])[0]["instances"]
        assert found.scores.dtype == torch.float32


class Recorder(hooks.HookBase):
    def __init__(self, losses):
        self.losses = losses

    def after_step(self):
        self.losses.append(self.trainer.storage.latest()["total_loss"][0])


def trained_sample(seed, size=(64, 96)):
    """An image with two objects, each with a mask."""
    boxes = torch.tensor([[5.0, 8.0, 40.0, 50.0], [30.0, 10.0, 80.0, 60.0]])
    masks = torch.zeros(2, *size, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = True
    instances = Instances(
        size, gt_boxes=Boxes(boxes), gt_classes=torch.tensor([1, 4]), gt_masks=BitMasks(masks)
    )
    return {"image": make_image(size, seed=seed), "instances": instances}


@ROI_HEADS_REGISTRY.register()
class HeadsThatCount(EarlyExitCascadeROIHeads):
    """A user's own: one more field, and box heads of one's own making."""

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        arguments = super()._init_box_head(cfg, input_shape)
        for head in arguments["box_heads"]:
            head.add_module("dropout", torch.nn.Dropout(0.5))
        return arguments

    def forward(self, images, features, proposals, targets=None):
        instances, losses = super().forward(images, features, proposals, targets)
        if not self.training:
            for found, given in zip(instances, proposals, strict=True):
                found.num_proposals = torch.full_like(found.pred_classes, len(given))
        return instances, {f"own_{name}": value for name, value in losses.items()}


class TestOthers:
    def test_subclass_of_a_user(self):
        cfg = model_cfg("HeadsThatCount", EXITS)
        model = build_detector(cfg)
        assert isinstance(model.roi_heads.box_head[1].dropout, torch.nn.Dropout)
        with torch.no_grad():
            found = model([{"image": make_image((64, 96))}])[0]["instances"]
        assert set(found.num_proposals.tolist()) == {model.roi_heads.stats.entered[0]}
        assert len(set(found.exit_stages.tolist())) > 1
        with EventStorage():
            losses = model.train()([trained_sample(0)])
        assert "own_loss_cls_stage2" in losses

    @pytest.mark.parametrize("keypoints", [3, 5])
    def test_keypoints(self, keypoints):
        options = ["MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (8,)]
        options += ["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", keypoints]
        ours, theirs = twins(options)
        scene = make_scene()
        wanted = detect(theirs, scene)
        assert wanted[0].pred_keypoints.shape == (len(wanted[0]), keypoints, 3)
        assert_same_instances(detect(ours, scene), wanted)
        losses = []
        for heads in (ours.train(), theirs.train()):
            targets = targets_of(scene)
            for instances in targets:
                points = instances.gt_boxes.get_centers()[:, None].repeat(1, keypoints, 1)
                visible = torch.full_like(points[..., :1], 2.0)
                instances.gt_keypoints = Keypoints(torch.cat([points, visible], dim=2))
            torch.manual_seed(0)
            with EventStorage():
                losses.append(heads(None, features_of(scene), proposals_of(scene), targets)[1])
        assert losses[0] == losses[1]
        assert losses[0]["loss_keypoint"] > 0

    def test_supervision(self, data):
        supervision = pytest.importorskip("supervision", exc_type=ImportError)
        cfg = model_cfg(options=[*data, *EXITS, *MASKS])
        with torch.no_grad():
            inputs = {"image": make_image((64, 96)), "height": 64, "width": 96}
            output = build_detector(cfg)([inputs])[0]
        detections = supervision.Detections.from_detectron2(output)
        found = output["instances"]
        assert len(detections) == len(found) > 5
        assert np.array_equal(detections.xyxy, found.pred_boxes.tensor.numpy())
        assert np.array_equal(detections.confidence, found.scores.numpy())
        assert np.array_equal(detections.class_id, found.pred_classes.numpy())
        assert detections.mask.shape == (len(found), 64, 96)

    def test_sahi(self, tmp_path):
        sahi = pytest.importorskip("sahi", exc_type=ImportError)
        pytest.importorskip("pkg_resources", exc_type=ImportError)  # Detectron2's model zoo has it
        from sahi.predict import get_prediction, get_sliced_prediction

        # One of our own files: SAHI merges it without knowing any key of ours.
        file = tmp_path / "config.yaml"
        file.write_text(
            f"_BASE_: {CONFIGS / 'quick_schedules' / 'demo.yaml'}\n"
            "MODEL:\n"
            "  RESNETS: {NORM: GN}\n"
            "  CASCADE: {EXIT: {PRUNE_THRESHOLDS: '(0.2, 0.2)'}}\n"
        )
        cfg = get_cfg()
        add_cascade_config(cfg)
        cfg.merge_from_file(str(file))
        reference = build_detector(cfg)
        DetectionCheckpointer(reference, str(tmp_path)).save("model")
        model = sahi.AutoDetectionModel.from_pretrained(
            model_type="detectron2",
            model_path=str(tmp_path / "model.pth"),
            config_path=str(file),
            device="cpu",
            confidence_threshold=0.1,
            image_size=160,
        )
        heads = model.model.model.roi_heads
        assert isinstance(heads, EarlyExitCascadeROIHeads)
        assert heads.exits.prune_thresholds == (0.2, 0.2)
        image = np.ascontiguousarray(picture((160, 240))[:, :, ::-1])
        whole = get_prediction(image, model).object_prediction_list
        assert sum(heads.stats.left[0].values()) > 0
        cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
        cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = 160
        wanted = DefaultPredictor(cfg)(image[:, :, ::-1])["instances"]
        wanted = wanted[wanted.scores >= 0.1]
        assert len(whole) == len(wanted) > 0
        assert [p.category.id for p in whole] == wanted.pred_classes.tolist()
        sliced = get_sliced_prediction(
            image, model, slice_height=96, slice_width=96, perform_standard_pred=False, verbose=0
        )
        assert len(sliced.object_prediction_list) > 0


@pytest.fixture(scope="module")
def mask_rcnns():
    """Cascade Mask R-CNN from Detectron2's own YAML, with only the name of the heads changed."""
    pair = []
    for name in (OURS, THEIRS):
        cfg = get_cfg()
        cfg.merge_from_file(detectron2_yaml("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"))
        cfg.MODEL.ROI_HEADS.NAME = name
        cfg.MODEL.DEVICE = "cpu"
        torch.manual_seed(0)
        pair.append(build_model(cfg))
    ours, theirs = pair
    keep_in_range(theirs)
    ours.load_state_dict(theirs.state_dict())
    return pair


class TestCascadeMaskRCNN:
    def test_inference(self, mask_rcnns):
        outputs = []
        for model in mask_rcnns:
            model.eval()
            # Few detections: masks take the time of this test.
            model.roi_heads.box_predictor[-1].test_topk_per_image = 8
            inputs = {"image": make_image((96, 128)), "height": 48, "width": 64}
            with torch.no_grad():
                outputs.append(model([inputs])[0]["instances"])
        found, wanted = outputs
        assert len(wanted) == 8
        assert wanted.pred_masks.shape == (8, 48, 64)
        # Each with its own kernel for the crops.
        assert found.pred_classes.tolist() == wanted.pred_classes.tolist()
        torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=1e-4)
        torch.testing.assert_close(
            found.pred_boxes.tensor, wanted.pred_boxes.tensor, rtol=0, atol=0.01
        )
        assert (found.pred_masks != wanted.pred_masks).float().mean() < 1e-3

    def test_losses_of_a_step(self, mask_rcnns):
        losses = []
        for model in mask_rcnns:
            model.train()
            model.roi_heads.batch_size_per_image = 16
            torch.manual_seed(3)
            with EventStorage():
                losses.append(model([trained_sample(0)]))
        found, wanted = losses
        assert found.keys() == wanted.keys() >= {"loss_mask", "loss_box_reg_stage2"}
        for name, value in wanted.items():
            assert value > 0
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)

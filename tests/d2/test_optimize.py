"""Whole models of Detectron2, optimised: the detections of before, and of the standalone host's.

``pytest --junitxml`` records the largest differences.
"""

import copy
import logging
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from detectron2.evaluation import inference_context
from detectron2.modeling import BACKBONE_REGISTRY, GeneralizedRCNNWithTTA, build_model
from detectron2.modeling.backbone.fpn import FPN, build_resnet_fpn_backbone
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY, StandardRPNHead
from detectron2.utils.events import EventStorage
from shape_runs import saved
from two_hosts import (
    BACKBONES,
    EVERY,
    EXITS,
    FAST_KERNEL,
    MASKS,
    OWN_HEADS,
    build_two,
    in_detectron2,
    make_batch,
    stir,
)

from cascade_det import standalone
from cascade_det.config import augmentation_arguments
from cascade_det.core.fast_heads import FastBoxHead
from cascade_det.d2 import host, optimize
from cascade_det.d2.backbones import FPNBackbone
from cascade_det.d2.detector import Detector
from cascade_det.d2.fast_parts import LeanRPN
from cascade_det.errors import ConfigError
from cascade_det.layers.int8 import multiplies_int8_exactly
from cascade_det.layers.winograd import WinogradConv2d

pytestmark = pytest.mark.needs_detectron2

WIDE = ("MODEL.FPN.OUT_CHANNELS", 256)  # Winograd's convolutions
NORMS = ("MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "GN", "MODEL.FPN.FUSE_TYPE", "avg")
DILATED = ("MODEL.RESNETS.RES5_DILATION", 2)
FAST = ("MODEL.CASCADE.FAST.ENABLED", "True", "MODEL.CASCADE.FAST.DTYPE", "float32")
SAME = {
    "R-18": (*BACKBONES["R-18"], *NORMS, "MODEL.RPN.CONV_DIMS", (48, -1)),
    "R-50": (*BACKBONES["R-50"], *WIDE),
    **{name: BACKBONES[name] for name in ("mobilenet_v2", "efficientvit", "resnet_cascade")},
}


def fast(model, **arguments):
    return optimize(copy.deepcopy(model), **({"dtype": "float32"} | arguments))


@torch.no_grad()
def instances(model, count=2):
    return [output["instances"] for output in model(make_batch(count))]


def assert_alike(got, wanted):
    """Each detection is found again, once, and left at the same stage; returns the distance."""
    furthest = []
    for ours, theirs in zip(got, wanted, strict=True):
        apart = (ours.boxes[:, None] - theirs.boxes).abs().amax(dim=2)
        apart[ours.classes[:, None] != theirs.classes] = torch.inf
        distance, nearest = apart.min(dim=1)
        assert sorted(nearest.tolist()) == list(range(len(theirs)))
        torch.testing.assert_close(ours.scores, theirs.scores[nearest], rtol=0, atol=1e-3)
        assert torch.equal(ours.exit_stages, theirs.exit_stages[nearest])
        furthest.append(float(distance.max()))
    assert max(furthest) <= 0.02  # pixels
    return max(furthest)


@pytest.mark.parametrize("name", SAME)
def test_detections_are_those_of_before_and_of_the_standalone_host(name, record_property):
    ours, alone = build_two(*SAME[name], *FAST_KERNEL, *EXITS)
    wanted = ours.detect(make_batch(2))
    assert sum(map(len, wanted)) > 40
    ours.model = optimize(ours.model, dtype="float32")
    got = ours.detect(make_batch(2))
    record_property("before", assert_alike(got, wanted))
    standalone.optimize(alone.model, dtype="float32")
    record_property("standalone", assert_alike(got, alone.detect(make_batch(2))))
    # All that one host does, the other does as well.
    assert ours.model.optimizations == alone.model.optimizations
    assert isinstance(ours.model.proposal_generator, LeanRPN)
    assert not any(hasattr(module, "running_var") for module in ours.model.modules())


def test_the_plugin_changes_no_setting_of_the_process():
    """The process of a user of Detectron2 may hold other models."""
    code = """
        import detectron2.engine
        from process_settings import process_settings
        before = process_settings()
        import cascade_det.d2
        assert process_settings() == before
        from two_hosts import BACKBONES, EXITS, build_two, make_batch
        model = build_two(*BACKBONES["R-18"], *EXITS)[0]
        model.detect(make_batch(2))
        model.model = cascade_det.d2.optimize(model.model)
        model.detect(make_batch(2))
        assert process_settings() == before
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    not multiplies_int8_exactly(), reason="this CPU does not multiply 8 bits exactly"
)
@pytest.mark.parametrize("name", ["R-18", "R-50", "mobilenet_v2"])
def test_8_bits_are_those_of_the_standalone_host(name):
    ours, alone = build_two(*SAME[name], *FAST_KERNEL)
    if name == "R-18":  # as MODEL.CASCADE.FAST builds it
        ours.model.roi_heads.use_fast_copies("auto")
    images = [make_batch(1), make_batch(2)]
    ours.model = optimize(ours.model, dtype="int8", images=images)
    standalone.optimize(alone.model, dtype="int8", images=images)
    assert ours.model.dtype == alone.model.dtype
    assert "int8: " in ours.model.dtype
    theirs, mine = Detector(ours.model), alone.model
    with torch.no_grad():
        for batch in images:
            got, wanted = theirs.cascade_inputs(batch), mine.cascade_inputs(batch)
            for a, b in zip(got.features, wanted.features, strict=True):
                # The grids are the same; a number between two steps may take either.
                assert (a - b).float().norm() < 0.02 * b.float().norm()


def test_images_are_for_our_heads():
    ours = in_detectron2(*BACKBONES["R-18"], "MODEL.ROI_HEADS.NAME", "CascadeROIHeads")
    with pytest.raises(ValueError, match="images need a model with EarlyExitCascadeROIHeads"):
        optimize(ours.model, images=[make_batch(1)])


def test_maps_are_pooled_where_they_were_made():
    ours = in_detectron2(*BACKBONES["R-50"], *WIDE)
    model = optimize(ours.model, dtype="float32")
    assert isinstance(model.backbone, FPNBackbone)
    assert sum(isinstance(m, WinogradConv2d) for m in model.modules()) > 5
    with torch.no_grad():
        inputs = Detector(model).cascade_inputs(make_batch(1))
        table = model.roi_heads.cascade.pooler.prepare(inputs.features).table
    assert table.data_ptr() == inputs.features[0].data_ptr()


@pytest.mark.parametrize("masks", [MASKS, EVERY], ids=["last", "every"])
def test_masks_are_those_of_before(masks):
    ours, _ = build_two(*BACKBONES["R-18"], *masks)
    wanted = instances(ours.model.eval())
    model = fast(ours.model)
    assert any("mask heads read regions" in sentence for sentence in model.optimizations)
    for found, own in zip(instances(model), wanted, strict=True):
        assert own.pred_masks.float().mean() > 0.005
        differ = found.pred_masks != own.pred_masks
        assert differ.sum() <= 1e-3 * differ.numel()


def test_augmentation_is_that_of_before():
    keys = ("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (64, 96), "TEST.AUG.MAX_SIZE", 128)
    ours, _ = build_two(*BACKBONES["R-18"], *MASKS, *keys)
    assert augmentation_arguments(ours.cfg)
    model = fast(ours.model.eval())
    plain, augmented = (GeneralizedRCNNWithTTA(ours.cfg, m) for m in (ours.model, model))
    wanted = instances(plain, 1)[0]
    with inference_context(augmented):  # which calls train(True) at its end
        got = instances(augmented, 1)[0]
    torch.testing.assert_close(got.pred_boxes.tensor, wanted.pred_boxes.tensor, rtol=0, atol=0.01)
    assert (got.pred_masks != wanted.pred_masks).float().mean() <= 1e-3
    assert len(instances(model.eval())) == 2


class OwnPyramid(FPN):
    """A user's."""


@BACKBONE_REGISTRY.register()
def build_own_backbone(cfg, shape):
    built = build_resnet_fpn_backbone(cfg, shape)
    built.__class__ = OwnPyramid
    return built


@RPN_HEAD_REGISTRY.register()
class OwnHead(StandardRPNHead):
    """A user's."""


class TestUnknownParts:
    def test_a_backbone_stays_and_is_named(self, caplog):
        torch.manual_seed(0)
        ours = in_detectron2(*BACKBONES["R-18"], "MODEL.BACKBONE.NAME", "build_own_backbone")
        stir(ours.model)
        wanted = ours.detect(make_batch(2))
        half = fast(ours.model, dtype="bfloat16")
        with caplog.at_level(logging.INFO, "cascade_det.engine.optimization"):
            ours.model = fast(ours.model)
        said = "As before, in float32: backbone (OwnPyramid over ResNet)."
        assert said in ours.model.optimizations
        assert said in caplog.text
        assert_alike(ours.detect(make_batch(2)), wanted)
        assert {p.dtype for p in half.backbone.parameters()} == {torch.float32}
        assert half.proposal_generator.rpn_head.conv.weight.dtype == torch.bfloat16
        assert len(instances(half)) == 2

    @pytest.mark.parametrize(
        ("options", "names"),
        [
            (
                (*OWN_HEADS, "MODEL.RPN.HEAD_NAME", "OwnHead"),
                "proposal_generator (RPN), roi_heads (CascadeROIHeads)",
            ),
            (
                (
                    *("MODEL.META_ARCHITECTURE", "PanopticFPN", *MASKS),
                    *("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (16,)),
                ),
                "keypoint_head (KRCNNConvDeconvUpsampleHead), sem_seg_head (SemSegFPNHead)",
            ),
        ],
        ids=["heads", "panoptic"],
    )
    def test_others_get_float32_maps(self, options, names):
        torch.manual_seed(0)
        ours = in_detectron2(*BACKBONES["R-18"], *FAST_KERNEL, *options)
        stir(ours.model)
        plain = instances(ours.model.eval())
        model = fast(ours.model)
        assert f"As before, in float32: {names}." in model.optimizations
        boxes = [[x.pred_boxes.tensor for x in found] for found in (instances(model), plain)]
        for got, wanted in zip(*boxes, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0.01)
        half = fast(ours.model, dtype="bfloat16")
        assert half.backbone.fpn_output2.weight.dtype == torch.bfloat16
        assert len(instances(half)) == 2


def test_types_by_part():
    ours, _ = build_two(*BACKBONES["R-18"])
    wanted = Detector(ours.model).cascade_inputs(make_batch(1)).features
    for parts in ((), ("stem", "fpn", "roi_heads")):
        model = fast(ours.model, dtype="bfloat16", float32_parts=parts)
        layers = {
            "stem": model.backbone.bottom_up.stem.conv1,
            "backbone": model.backbone.bottom_up.res5[0].conv2,
            "fpn": model.backbone.fpn_output2,
            "rpn": model.proposal_generator.rpn_head.conv,
            "roi_heads": model.roi_heads.cascade.box_head[0].layers[0],
        }
        types = {name for name, layer in layers.items() if layer.weight.dtype == torch.float32}
        assert types == set(parts)
        for got, own in zip(
            Detector(model).cascade_inputs(make_batch(1)).features, wanted, strict=True
        ):
            assert 0 < (got.float() - own).norm() < 0.1 * own.norm()
        assert len(instances(model)) == 2


@pytest.fixture(scope="module")
def model():
    return optimize(in_detectron2(*BACKBONES["R-18"]).model)


class TestErrors:
    def test_training(self, model):
        with pytest.raises(RuntimeError, match="cannot be trained: its norms are folded"):
            model.train()
        with pytest.raises(RuntimeError, match="cannot be trained"), EventStorage():
            Detector(model).losses(make_batch(1))
        assert not model.training
        with pytest.raises(RuntimeError, match="cannot be trained"):
            copy.deepcopy(model).train(True)(make_batch(1))

    def test_saving(self, model, tmp_path):
        with pytest.raises(RuntimeError, match="cannot be saved"):
            DetectionCheckpointer(model, str(tmp_path)).save("model")
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(RuntimeError, match="cannot load weights"):
            model.load_state_dict({}, strict=False)

    def test_copies_refuse_too(self, model):
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert len(instances(copied)) == 2
            with pytest.raises(RuntimeError, match="cannot be trained"):
                copied.train()
            assert copied.train.args == (copied,)

    def test_twice(self, model):
        with pytest.raises(ValueError, match="optimised already"):
            optimize(model)

    def test_another_model(self):
        with pytest.raises(ValueError, match="takes a GeneralizedRCNN, not a Linear"):
            optimize(torch.nn.Linear(1, 1))

    def test_a_wrong_type_leaves_the_model_as_it_is(self):
        model = in_detectron2(*BACKBONES["R-18"]).model
        with pytest.raises(ConfigError, match="for GPUs"):
            optimize(model, dtype="float16")
        with pytest.raises(ValueError, match=r"unknown parts \['neck'\]"):
            optimize(model, float32_parts=("neck",))
        assert not hasattr(model, "optimizations")
        assert len(model.train().state_dict()) > 100


@pytest.mark.usefixtures("no_pictures")
def test_the_key_makes_evaluation_and_calibration_fast(make_cfg):
    """A training with FAST on ends in plain weights; a predictor of Detectron2 may be optimised."""
    cfg = make_cfg("SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()", *FAST)
    host.train(cfg)
    assert set(saved(cfg)["model"]) == set(build_model(cfg).state_dict())
    weights = ("MODEL.WEIGHTS", f"{cfg.OUTPUT_DIR}/model_final.pth", "INPUT.MIN_SIZE_TEST", "64")
    views = ("TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64,)")
    cfg = make_cfg(*weights, *FAST, *views)
    results = host.evaluate(cfg)
    assert results.keys() >= {"bbox", "bbox_TTA", "stages"}
    detector, _, _ = host.open_detector(cfg)
    assert isinstance(detector.model.proposal_generator, LeanRPN)
    assert detector.dtype == "float32"

    predictor = DefaultPredictor(make_cfg(*weights))
    image = make_batch(1)[0]["image"].permute(1, 2, 0).numpy()
    wanted = predictor(image)["instances"].pred_boxes.tensor
    optimize(predictor.model, dtype="float32")
    got = predictor(image)["instances"].pred_boxes.tensor
    torch.testing.assert_close(got, wanted, rtol=0, atol=0.01)
    heads = predictor.model.roi_heads.cascade.box_head
    assert all(isinstance(head, FastBoxHead) for head in heads)

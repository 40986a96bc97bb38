"""A detector gives the same in every mode, and leaves the mode as it is."""

import copy

import pytest
import torch
from small_backbones import ATTENTION
from small_cascades import assert_same_detections
from small_detectors import make_detector, random_image
from torch import nn

from cascade_det.layers.conv_norm import ConvNorm
from cascade_det.monitoring.monitor import ExitMonitor
from cascade_det.onnx_predictor import ExportedModel
from cascade_det.standalone import build_detector
from cascade_det.standalone.export import export_onnx


@pytest.fixture
def detector():
    """With norms and dropout in its trunk and in its heads."""
    detector = make_detector(conv_dims=(6,))
    trunk = detector.backbone.bottom_up
    trunk.first = nn.Sequential(trunk.first, nn.BatchNorm2d(8), nn.Dropout(0.5))
    for head in detector.roi_heads.box_head:
        head.conv1 = ConvNorm(6, 6, 3, norm="BN")
    return detector.eval()


@pytest.fixture
def batch():
    return [{"image": random_image(90, 120, seed=i)} for i in range(2)]


def boxes_and_scores(detections):
    return [x for found in detections for x in (found.boxes, found.scores)]


def of_cascade(call):
    """``call`` on the cascade, with inputs of a twin in evaluation mode."""

    def run(detector, batch):
        inputs = copy.deepcopy(detector).eval().cascade_inputs(batch)
        return call(detector.roi_heads, inputs.features, inputs.proposals, inputs.image_sizes)

    return run


CALLS = {
    "detect": lambda d, b: boxes_and_scores(d.detect(b).detections),
    "stages": lambda d, b: boxes_and_scores(d.detect(b, stages=True).stages[1].detections),
    "inputs": lambda d, b: d.cascade_inputs(b).features,
    "monitor": lambda d, b: boxes_and_scores(ExitMonitor(d).detect(b).detections),
    "cascade": of_cascade(lambda c, *inputs: boxes_and_scores(c.detect(*inputs)[0])),
    "its stages": of_cascade(
        lambda c, *inputs: boxes_and_scores(c.detect_stages(*inputs)[1].detections)
    ),
    "its record": of_cascade(lambda c, *inputs: [s.boxes for s in c.record(*inputs).stages]),
}


def modes_of(detector):
    return {name: module.training for name, module in detector.named_modules()}


def mix_modes(detector):
    """Training, but for a norm and a stage that are frozen."""
    detector.train()
    detector.backbone.bottom_up.first[1].eval()
    detector.roi_heads.box_head[1].eval()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
class TestModes:
    def test_the_mode_changes_nothing_and_is_not_changed(self, call, detector, batch):
        wanted = call(detector, batch)
        assert sum(x.numel() for x in wanted) > 0
        mix_modes(detector)
        modes, state = modes_of(detector), copy.deepcopy(detector.state_dict())
        for a, b in zip(call(detector, batch), wanted, strict=True):
            assert torch.equal(a, b)
        assert modes_of(detector) == modes
        for name, value in detector.state_dict().items():
            assert torch.equal(value, state[name]), name

    def test_nothing_is_written_in_evaluation_mode(self, call, detector, batch, monkeypatch):
        """So that threads can share a detector."""
        own, written, write = set(detector.modules()), [], nn.Module.__setattr__

        def noticed(module, name, value):
            if name == "training" and module in own:
                written.append(module)
            write(module, name, value)

        monkeypatch.setattr(nn.Module, "__setattr__", noticed)
        call(detector, batch)
        assert not written


def test_an_export_leaves_the_modes(detector, tmp_path, monkeypatch):
    pytest.importorskip("onnx")

    def export(model, *_, **__):
        assert not any(modes_of(model).values())
        raise KeyError("no more is needed")

    monkeypatch.setattr(torch.onnx, "export", export)
    mix_modes(detector)
    modes = modes_of(detector)
    description = ExportedModel(
        class_names=["a", "b", "c"],
        category_ids=[1, 2, 3],
        image_format="BGR",
        min_size=64,
        max_size=128,
        num_stages=1,
    )
    with pytest.raises(KeyError):
        export_onnx(detector, tmp_path / "model.onnx", description)
    assert modes_of(detector) == modes


@pytest.mark.parametrize("name", ["efficientvit", "hatnet", "hiervit"])
def test_a_replay_of_a_record_is_the_run_with_every_backbone(instant_cfg, batch, name):
    exits = ["MODEL.CASCADE.EXIT.ENABLED", True, "MODEL.CASCADE.EXIT.THRESHOLDS", (0.5,)]
    exits += ["MODEL.CASCADE.EXIT.PRUNE_THRESHOLDS", (0.05, 0.1)]
    instant_cfg.merge_from_list([*ATTENTION[name], *exits])
    detector = build_detector(instant_cfg).eval()
    for predictor in detector.roi_heads.box_predictor:
        nn.init.normal_(predictor.cls_score.weight, std=30.0)
    heads, inputs = detector.roi_heads, vars(detector.cascade_inputs(batch))
    policy, record = heads.exits, heads.record(**inputs)
    for exits in (policy, None):
        detector.set_exits(exits)
        wanted, stats = heads.detect(**inputs)
        replay = record.replay(exits)
        assert replay.stats == stats
        assert sum(map(len, wanted)) > 5
        assert (stats.entered[2] < stats.entered[0]) == (exits is not None)
        assert_same_detections(record.select(replay.reported), wanted)

"""Which weights are enough to detect with, and what is said of those that are not."""

from pathlib import Path

import pytest
import torch
from torch import nn

from cascade_det.config import load_config
from cascade_det.engine.checkpoint import Checkpointer
from cascade_det.errors import CheckpointError
from cascade_det.standalone import build_detector
from cascade_det.weights import load_weights

ROOT = Path(__file__).resolve().parents[2]


def detector(stages, learned=(), classes=4):
    """The names of a detector with a cascade; ``learned`` exits have two tensors each."""
    model, heads, exits = nn.Module(), nn.Module(), nn.Module()
    model.backbone = nn.Linear(2, 2)
    model.roi_heads = heads
    heads.box_head = nn.ModuleList(nn.Linear(2, 3) for _ in range(stages))
    heads.box_predictor = nn.ModuleList(nn.Linear(3, classes) for _ in range(stages))
    heads.exits = exits
    exits.learned = nn.ModuleDict({name: nn.Linear(2, 1) for name in learned})
    return model


@pytest.fixture
def file_of(tmp_path):
    def save(model):
        torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
        return tmp_path / "weights.pth"

    return save


@pytest.mark.parametrize(
    ("in_file", "wanted", "words"),
    [
        (3, 4, "has 3 stages (roi_heads.box_head.0-2), but MODEL.ROI_BOX_CASCADE_HEAD.IOUS has 4"),
        (1, 2, "has 1 stage (roi_heads.box_head.0), but MODEL.ROI_BOX_CASCADE_HEAD.IOUS has 2"),
        (2, 4, "train stages 2 and 3 (cascade-det train"),
    ],
)
def test_stages_that_are_missing_are_an_error(in_file, wanted, words, file_of):
    path = file_of(detector(in_file))
    model = detector(wanted)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, path, complete=True)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
    assert "train" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("complete", [False, True])
def test_stages_that_are_too_many_are_left_out(complete, file_of):
    source, model = detector(3), detector(2)
    report = load_weights(model, file_of(source), complete=complete)
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])
    left_out = str(report).partition("no place in this model, left out")[2].split("\n    ")[1:]
    assert left_out == ["roi_heads.box_head.2 (2 tensors)", "roi_heads.box_predictor.2 (2 tensors)"]


def test_for_training_what_is_missing_starts_afresh(file_of):
    report = load_weights(detector(4, learned=["gate"]), file_of(detector(3)))
    afresh = str(report).partition("not in the file, left as initialised")[2].split("\n    ")[1:]
    assert [line.strip() for line in afresh] == [
        "roi_heads.box_head.3 (2 tensors)",
        "roi_heads.box_predictor.3 (2 tensors)",
        "roi_heads.exits (2 tensors)",
    ]


@pytest.mark.parametrize(
    ("in_file", "wanted", "missing"),
    [
        ((), ("gate", "pruner"), "gate, pruner"),
        (("gate",), ("gate", "iou_head"), "iou_head"),
        (("gate", "pruner"), ("gate",), None),
    ],
)
def test_learned_exits_that_are_missing_are_an_error(in_file, wanted, missing, file_of):
    path, model = file_of(detector(3, in_file)), detector(3, wanted)
    if missing is None:
        assert load_weights(model, path, complete=True).missing == []
        return
    with pytest.raises(CheckpointError, match="FREEZE_DETECTOR") as caught:
        load_weights(model, path, complete=True)
    assert f"{path}: has no weights that fit the learned exits {missing} (" in str(caught.value)


def test_learned_exits_of_another_shape_are_missing(file_of):
    source, model = detector(3, ["gate"]), detector(3, ["gate"])
    source.roi_heads.exits.learned["gate"] = nn.Linear(5, 1)
    with pytest.raises(CheckpointError, match=r"learned exits gate .*learned\.gate\.weight"):
        load_weights(model, file_of(source), complete=True)


def test_other_classes_are_an_error_unless_a_training_follows(file_of):
    path = file_of(detector(3, classes=7))
    assert len(load_weights(detector(3), path).reinitialised) == 6
    with pytest.raises(CheckpointError, match=r"NUM_CLASSES") as caught:
        load_weights(detector(3), path, complete=True)
    told = "roi_heads.box_predictor.0.weight is (7, 3) in the file, (4, 3) in the model"
    assert f"{path}: {told}" in str(caught.value)


def test_a_trunk_is_enough_for_a_training_alone(file_of):
    backbone = nn.Module()
    backbone.backbone = nn.Linear(2, 2)
    path = file_of(backbone)
    assert len(load_weights(detector(3), path).loaded) == 2
    with pytest.raises(CheckpointError, match=r"MODEL\.WEIGHTS") as caught:
        load_weights(detector(3), path, complete=True)
    assert f"{path}: lacks the box heads (12 of 12 tensors)" in str(caught.value)


PARTS = {
    "the backbone": ("backbone.bottom_up.res3.0.conv2.weight",),
    "the FPN": ("backbone.fpn_output3.weight",),
    "the RPN": ("proposal_generator.rpn_head.conv.weight",),
    "the box heads": ("roi_heads.box_head.1.fc1.weight",),
    "the backbone (4": tuple(
        f"backbone.bottom_up.stem.conv1.norm.{kind}"
        for kind in ("weight", "bias", "running_mean", "running_var")
    ),
    "the backbone (2": tuple(
        f"backbone.bottom_up.res2.0.conv1.norm.running_{kind}" for kind in ("mean", "var")
    ),
}


@pytest.fixture(scope="module")
def cfg():
    resnet = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.RESNETS.DEPTH", "18"]
    path = ROOT / "configs" / "quick_schedules" / "instant_test.yaml"
    return load_config(path, [*resnet, "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"])


@pytest.fixture(scope="module")
def whole(cfg):
    return build_detector(cfg)


class TestWholeDetectors:
    @pytest.mark.parametrize(("part", "names"), PARTS.items())
    def test_a_single_tensor_that_is_missing_is_an_error(self, part, names, whole, tmp_path):
        state = {k: v for k, v in whole.state_dict().items() if k not in names}
        assert len(state) == len(whole.state_dict()) - len(names)
        torch.save(state, tmp_path / "file.pth")
        load_weights(whole, tmp_path / "file.pth")
        with pytest.raises(CheckpointError, match=r"MODEL\.WEIGHTS") as caught:
            load_weights(whole, tmp_path / "file.pth", complete=True)
        assert f"file.pth: lacks {part}" in str(caught.value)
        assert names[0] in str(caught.value)

    def test_untrained_tensors_may_be_missing(self, whole, tmp_path):
        computed = ("num_batches_tracked", "pixel_mean", "cell_anchors")
        state = {k: v for k, v in whole.state_dict().items() if not k.endswith(computed)}
        torch.save(
            {**state, "roi_heads.mask_head.predictor.weight": torch.zeros(1)}, tmp_path / "f.pth"
        )
        assert load_weights(whole, tmp_path / "f.pth", complete=True).missing == []

    @pytest.mark.parametrize(
        "more",
        [
            ["MODEL.RESNETS.DEPTH", "34"],
            ["MODEL.ROI_BOX_HEAD.NUM_FC", "3"],
            ["MODEL.RPN.CONV_DIMS", "[-1, -1]"],
        ],
    )
    def test_the_first_layers_of_a_deeper_model_are_another_one(self, cfg, more, whole, tmp_path):
        deeper = cfg.clone()
        deeper.merge_from_list(more)
        torch.save(build_detector(deeper).state_dict(), tmp_path / "deeper.pth")
        with pytest.raises(CheckpointError, match=r"deeper\.pth: (has|lacks)"):
            load_weights(whole, tmp_path / "deeper.pth", complete=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("complete", [False, True])
def test_weights_that_are_no_numbers_are_an_error(value, complete, file_of):
    source, model = detector(2).double(), detector(2)
    source.roi_heads.box_head[1].bias.data[2] = value
    source.roi_heads.box_predictor[0].weight.data[0, 0] = value
    path, before = file_of(source), model.state_dict()["backbone.weight"].clone()
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, path, complete=complete)
    names = "roi_heads.box_head.1.bias, roi_heads.box_predictor.0.weight"
    assert f"{path}: holds NaN or Inf in {names}, of 10 tensors" in str(caught.value)
    assert torch.equal(model.backbone.weight, before)


def test_numbers_that_this_model_has_no_use_for_may_be_anything(file_of):
    source = detector(3)
    source.roi_heads.box_head[2].weight.data.fill_(float("nan"))
    load_weights(detector(2), file_of(source), complete=True)


def test_a_run_is_not_resumed_from_weights_that_are_no_numbers(tmp_path):
    source = nn.Linear(2, 2)
    source.weight.data[1, 1] = float("nan")
    Checkpointer(source, tmp_path).save("model_0000004", iteration=4)
    with pytest.raises(CheckpointError, match=r"model_0000004\.pth: holds NaN or Inf in weight"):
        Checkpointer(nn.Linear(2, 2), tmp_path).resume_or_load("")

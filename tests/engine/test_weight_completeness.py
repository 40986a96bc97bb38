"""Which weights are enough to detect with, and what is said of those that are not."""

import pytest
import torch
from torch import nn

from cascade_det.engine.checkpoint import Checkpointer
from cascade_det.engine.weights import load_weights
from cascade_det.errors import CheckpointError


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
        (2, 4, "train stages 2 and 3 (tools/train_net.py"),
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


def test_other_classes_and_a_backbone_alone_are_as_before(file_of):
    report = load_weights(detector(3), file_of(detector(3, classes=7)), complete=True)
    assert len(report.reinitialised) == 6
    backbone = nn.Module()
    backbone.backbone = nn.Linear(2, 2)
    assert len(load_weights(detector(3), file_of(backbone), complete=True).loaded) == 2


def test_a_checkpointer_asks_for_it_where_it_is_told_to(file_of, tmp_path):
    path = str(file_of(detector(3)))
    checkpointer = Checkpointer(detector(4), tmp_path)
    checkpointer.resume_or_load(path, resume=False)
    with pytest.raises(CheckpointError, match="has 3 stages"):
        checkpointer.resume_or_load(path, resume=False, complete=True)

"""Files for ``--replay-batch`` that no training writes end in an error that names the file.

Both models have masks; that in Detectron2 has keypoints as well.
"""

import math
import os

import pytest
import torch
from hostile_steps import (
    BOX,
    HARMLESS,
    HOSTILE,
    ODD,
    changed,
    field,
    outcome,
    scrambled,
    truncated,
    without,
)
from shape_runs import INSTANT
from small_detectors import make_detector, make_masks

from cascade_det.engine.replay import replay
from cascade_det.engine.step_file import save_step
from cascade_det.engine.training_state import random_state
from cascade_det.errors import CheckpointError

BUILDERS = {"standalone": "build_detector", "detectron2": "build_model"}
# What the engine reads for both hosts.
in_one_host = pytest.mark.parametrize("host", ["standalone"], indirect=True)
MASK_HEADS = [
    *("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", "8", "MODEL.ROI_MASK_HEAD.NUM_CONV", "1"),
    *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", "7", "MODEL.KEYPOINT_ON", "True"),
    *("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "3", "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)"),
]
SQUARE = torch.tensor([8.0, 8.0, 50.0, 8.0, 50.0, 40.0, 8.0, 40.0])
MASKS = (
    [],
    [[]],
    [[SQUARE[:5]]],
    [[SQUARE[:4]]],
    [[SQUARE.view(4, 2)]],
    [[SQUARE * math.nan]],
    [[SQUARE * math.inf]],
    [[SQUARE * 1e9]],
    [[SQUARE], [SQUARE]],
    [["text"]],
    [SQUARE],
    [[[8.0, 8.0, 50.0, 8.0, 50.0, 40.0]]],
    {"size": [64, 96], "counts": "x"},
    "text",
    torch.zeros(1, 3, 3, dtype=torch.bool),
    torch.zeros(64, 96, dtype=torch.bool),
    torch.zeros(2, 64, 96, dtype=torch.bool),
)
# One for each object, in the standalone host.
OWN_MASKS = (
    [torch.zeros(1, 64, 96, dtype=torch.bool)],
    [torch.zeros(96, 64, dtype=torch.bool)],
    [torch.zeros(64, 96)],
    [torch.zeros(1, dtype=torch.bool).expand(64, 96), None],
    [SQUARE.long()],
    [[SQUARE.to(torch.complex64)]],
    [{"size": [64, 96], "counts": b"x"}],
    None,
)
FINE_MASKS = (
    [None],
    [torch.ones(64, 96, dtype=torch.bool)],
    [[SQUARE, SQUARE.double()]],
    torch.ones(1, 64, 96, dtype=torch.bool),  # as Detectron2 has bitmaps
)
KEYPOINTS = (
    torch.zeros(1, 3, 2),
    torch.zeros(2, 3, 3),
    torch.zeros(3, 3),
    [[1.0, 2.0, 2.0]],
    "text",
)
MASKS_AND_KEYPOINTS = {
    **{f"masks {i}": field("gt_masks", masks) for i, masks in enumerate(MASKS)},
    **{f"keypoints {i}": field("gt_keypoints", points) for i, points in enumerate(KEYPOINTS)},
}


@pytest.fixture(scope="module")
def cfg(host, options):
    more = MASK_HEADS if host.name == "detectron2" else ["MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    cfg = host.load_config(INSTANT, [*options, *more])
    host.check_config(cfg)
    return cfg


@pytest.fixture(scope="module")
def model(host, cfg, build_model):
    return make_detector(masks=make_masks()) if host.name == "standalone" else build_model(cfg)


@pytest.fixture(scope="module")
def step(host, model, tmp_path_factory):
    """The content of a file that a training wrote."""
    truth = {"gt_boxes": BOX, "gt_classes": torch.tensor([1]), "image_id": 1}
    truth["gt_masks"] = [[SQUARE]]
    if host.name == "detectron2":
        points = [[9.0, 9.0, 2.0], [30.0, 20.0, 2.0], [40.0, 30.0, 1.0]]
        truth["gt_keypoints"] = torch.tensor([points])
    image = torch.randint(256, (3, 64, 96), dtype=torch.uint8)
    path = tmp_path_factory.mktemp("step") / "step.pth"
    save_step(
        path,
        detector=model,
        batch=[{**truth, "image": image}] * 2,
        random=random_state(),
        iteration=7,
        amp_dtype=None,
    )
    return torch.load(path, weights_only=True)


@pytest.fixture
def replayed(host, cfg, model, tmp_path, monkeypatch):
    """``replayed(step)``: the report on a file with this content."""

    def build(_):
        model._forward_pre_hooks.clear()  # of the replay before
        return model

    monkeypatch.setitem(host.replay_batch.__globals__, BUILDERS[host.name], build)

    def replayed(step):
        path = tmp_path / "step.pth"
        if isinstance(step, bytes):
            path.write_bytes(step)
        else:
            torch.save(step, path)
        return host.replay_batch(cfg, path)

    return replayed


def test_the_file_of_a_training_is_replayed(host, step, replayed):
    report = "\n".join(replayed(step))
    assert "iteration 7, image ids [1, 1]" in report
    losses = ("loss_mask", *(["loss_keypoint"] if host.name == "detectron2" else []))
    assert all(name in report for name in losses)


def test_what_no_training_writes_is_an_error_of_the_file(host, step, replayed):
    changes = HOSTILE
    if host.name == "detectron2":
        of_samples = ("image", "boxes", "classes")
        changes = {k: v for k, v in HOSTILE.items() if k.startswith(of_samples)}
        changes |= MASKS_AND_KEYPOINTS
    else:
        masks = enumerate((*MASKS, *OWN_MASKS))
        changes = changes | {f"masks {i}": field("gt_masks", value) for i, value in masks}
        changes["no masks"] = without("gt_masks", "batch")
    for name, change in changes.items():
        told = outcome(replayed, changed(step, change))
        assert "step.pth" in told, name
        assert len(told) < 1500, name


def test_what_is_strange_is_replayed(host, step, replayed):
    for name, change in HARMLESS.items():
        told = outcome(replayed, changed(step, change))
        # Masks of such an image, or of such boxes, may not be computable.
        may_fail = host.name == "detectron2" or name.startswith("boxes")
        assert (may_fail and "step.pth" in told) or told.startswith("iteration 7, image ids ["), (
            name
        )
        assert len(told) < 3000, name


@in_one_host
def test_masks_of_every_kind_are_replayed(step, replayed):
    for masks in FINE_MASKS:
        report = "\n".join(replayed(changed(step, field("gt_masks", masks))))
        assert "loss_mask" in report


@in_one_host
def test_any_value_in_any_place_is_replayed_or_an_error(step, replayed):
    outcomes = [outcome(replayed, changed(step, change)) for change in ODD.values()]
    errors = sum("step.pth" in told for told in outcomes)
    assert 0 < errors < len(outcomes)
    assert errors + sum(told.startswith("iteration ") for told in outcomes) == len(outcomes)


@in_one_host
def test_damaged_files(step, replayed, tmp_path):
    replayed(step)
    content = (tmp_path / "step.pth").read_bytes()
    for share in (0, 0.01, 0.5, 0.99):
        with pytest.raises(CheckpointError, match=r"step\.pth"):
            replayed(truncated(content, share))
    for seed in range(30):
        told = outcome(replayed, scrambled(content, seed))
        assert "step.pth" in told or told.startswith("iteration ")


@in_one_host
def test_a_pipe_is_not_waited_for(model, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "gone"):
        with pytest.raises(CheckpointError, match="there is no such file"):
            replay(tmp_path / name, model, device="cpu")

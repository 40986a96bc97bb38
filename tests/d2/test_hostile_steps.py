"""Files for ``--replay-batch`` in Detectron2, with masks and keypoints: as in the other host."""

import copy
import math

import pytest
import torch

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.modeling import build_model
from hostile_steps import BOX, HARMLESS, HOSTILE, changed, field, outcome

from cascade_det.d2 import host
from cascade_det.engine.divergence import save_step
from cascade_det.engine.training_state import random_state
from cascade_det.errors import CheckpointError

pytestmark = pytest.mark.needs_detectron2

HEADS = [
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
KEYPOINTS = (
    torch.zeros(1, 3, 2),
    torch.zeros(2, 3, 3),
    torch.zeros(3, 3),
    [[1.0, 2.0, 2.0]],
    "text",
)
OF_SHAPES = {
    **{f"masks {i}": field("gt_masks", masks) for i, masks in enumerate(MASKS)},
    **{f"keypoints {i}": field("gt_keypoints", points) for i, points in enumerate(KEYPOINTS)},
}


@pytest.fixture
def replayed(make_cfg, tmp_path, monkeypatch):
    """``replayed(step)``: what is said of a file of it; ``step`` by default of a training."""
    cfg = make_cfg(*HEADS)
    model = build_model(cfg)
    monkeypatch.setattr("cascade_det.d2.train.build_model", lambda _: copy.deepcopy(model))
    truth = {
        "gt_boxes": BOX,
        "gt_classes": torch.tensor([1]),
        "gt_masks": [[SQUARE]],
        "gt_keypoints": torch.tensor([[[9.0, 9.0, 2.0], [30.0, 20.0, 2.0], [40.0, 30.0, 1.0]]]),
        "image_id": 1,
    }
    image = torch.randint(256, (3, 64, 96), dtype=torch.uint8)
    save_step(
        tmp_path / "first.pth",
        detector=model,
        batch=[{**truth, "image": image}] * 2,
        random=random_state(),
        iteration=7,
        amp_dtype=None,
    )

    def replayed(step):
        torch.save(step, tmp_path / "step.pth")
        return host.replay_batch(cfg, tmp_path / "step.pth")

    replayed.step = torch.load(tmp_path / "first.pth", weights_only=True)
    return replayed


def test_what_a_training_writes_is_replayed(replayed):
    report = "\n".join(replayed(replayed.step))
    assert "iteration 7, image ids [1, 1]" in report
    assert "loss_mask" in report
    assert "loss_keypoint" in report


def test_what_no_training_writes_is_an_error_of_the_file(replayed):
    # The rest of the file is read by what both hosts have.
    of_images = {k: v for k, v in HOSTILE.items() if k.startswith(("image", "boxes", "classes"))}
    for name, change in {**of_images, **OF_SHAPES}.items():
        try:
            with pytest.raises(CheckpointError, match=r"step\.pth"):
                replayed(changed(replayed.step, change))
        except pytest.fail.Exception as failure:
            raise AssertionError(name) from failure


def test_what_is_strange_is_replayed_or_an_error(replayed):
    for change in HARMLESS.values():
        told = outcome(replayed, changed(replayed.step, change))
        assert "step.pth" in told or told.startswith("iteration 7, ")

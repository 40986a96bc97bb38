"""Files for ``--replay-batch``: what they hold is replayed, or an error that names the file."""

import os

import pytest
import torch
from hostile_steps import HARMLESS, HOSTILE, ODD, changed, outcome, scrambled, truncated
from small_detectors import make_detector, random_image

from cascade_det.config import get_cfg
from cascade_det.engine.divergence import replay, save_step
from cascade_det.engine.training_state import random_state
from cascade_det.errors import CheckpointError
from cascade_det.standalone import replay_batch


@pytest.fixture(scope="module")
def detector():
    return make_detector()


@pytest.fixture(scope="module")
def step(detector, tmp_path_factory):
    """What a training writes, read."""
    path = tmp_path_factory.mktemp("step") / "step.pth"
    objects = torch.tensor([[10.0, 12.0, 60.0, 50.0]]), torch.tensor([1])
    sample = dict(zip(("gt_boxes", "gt_classes"), objects, strict=True), image_id=1)
    save_step(
        path,
        detector=detector,
        batch=[{**sample, "image": random_image(64, 96, seed=seed)} for seed in range(2)],
        random=random_state(),
        iteration=7,
        amp_dtype=None,
    )
    return torch.load(path, weights_only=True)


@pytest.fixture
def replayed(detector, tmp_path, monkeypatch):
    """``replayed(step)``: what is said of a file of it."""
    monkeypatch.setitem(replay_batch.__globals__, "build_detector", lambda _: detector)
    cfg = get_cfg()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.MODEL.DEVICE = "cpu"

    def replayed(step):
        if not isinstance(step, bytes):
            torch.save(step, tmp_path / "step.pth")
        else:
            (tmp_path / "step.pth").write_bytes(step)
        return replay_batch(cfg, tmp_path / "step.pth")

    return replayed


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_what_no_training_writes_is_an_error_of_the_file(change, step, replayed):
    with pytest.raises(CheckpointError, match=r"step\.pth") as error:
        replayed(changed(step, change))
    assert len(str(error.value)) < 1500


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_what_is_strange_is_replayed(change, step, replayed):
    report = replayed(changed(step, change))
    assert report[0].startswith("iteration 7, image ids [")
    assert len("\n".join(report)) < 3000


def test_any_value_in_any_place_is_replayed_or_an_error(step, replayed):
    outcomes = [outcome(replayed, changed(step, change)) for change in ODD.values()]
    errors = sum("step.pth" in told for told in outcomes)
    assert 0 < errors < len(outcomes)
    assert errors + sum(told.startswith("iteration ") for told in outcomes) == len(outcomes)


def test_damaged_files(step, replayed, tmp_path):
    replayed(step)
    content = (tmp_path / "step.pth").read_bytes()
    for share in (0, 0.01, 0.5, 0.99):
        with pytest.raises(CheckpointError, match=r"step\.pth"):
            replayed(truncated(content, share))
    for seed in range(30):
        told = outcome(replayed, scrambled(content, seed))
        assert "step.pth" in told or told.startswith("iteration ")


def test_what_is_no_file_is_not_waited_for(detector, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "gone"):
        with pytest.raises(CheckpointError, match="there is no such file"):
            replay(tmp_path / name, detector, device="cpu")

"""A training that diverges: what is said, what is kept, and what a replay finds."""

import math
import re

import pytest
import torch
from toy_detectors import make_resumable, make_trainer

from cascade_det.engine.divergence import divergence
from cascade_det.engine.hooks import Hook
from cascade_det.engine.replay import replay
from cascade_det.engine.step_file import save_step
from cascade_det.engine.training_state import random_state
from cascade_det.errors import CheckpointError

GOOD = {
    "total_loss": 3.0,
    "loss_rpn_cls": 1.0,
    "loss_cls_stage0": 1.0,
    "loss_box_reg_stage2": 1.0,
    "stage0/nonfinite_boxes": 0.0,
    "stage2/nonfinite_boxes": 0.0,
    "stage2/iou_after": math.nan,
    "gradient_norm": 2.0,
}


@pytest.mark.parametrize(
    ("bad", "place"),
    [
        (
            {"loss_rpn_cls": math.inf, "loss_cls_stage0": math.nan},
            "in the RPN, loss_rpn_cls is inf",
        ),
        (
            {"loss_box_reg_stage2": math.nan, "total_loss": math.nan},
            "in stage 2 of the cascade, loss_box_reg_stage2 is nan",
        ),
        ({"stage0/nonfinite_boxes": 3.0}, "in stage 0 of the cascade, boxes are NaN or Inf"),
        (
            {"stage2/nonfinite_boxes": 0.5, "loss_cls_stage0": -math.inf},
            "in stage 0 of the cascade, loss_cls_stage0 is -inf",
        ),
        ({"rpn/nonfinite_boxes": 1.0}, "in the RPN, boxes are NaN or Inf"),
        (
            {"amp/scale": 6e-5},
            "in the backward pass, gradients overflow however small the loss is scaled",
        ),
        ({"gradient_norm": math.inf}, "in the backward pass, gradient_norm is inf"),
    ],
)
def test_the_first_place_in_the_order_of_the_computation_is_named(bad, place):
    message = divergence({**GOOD, **bad})
    assert message.startswith(place)
    assert "loss_box_reg_stage2" in message
    assert "iou_after" not in message


def test_a_metric_without_value_is_no_divergence():
    assert divergence(GOOD) is None
    assert divergence({**GOOD, "amp/scale": 1.0}) is None


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_float16_that_overflows_at_every_scale_is_a_divergence(make_detector, make_loader):
    """The scaler leaves out every step, and the losses stay as they are: nothing else shows it."""

    class Overflows(make_detector):
        def losses(self, batch):
            losses = super().losses(batch)
            self.head.weight.register_hook(lambda gradient: gradient * math.inf)
            return losses

    trainer = make_trainer(Overflows(), make_loader(), max_iter=100, warmup=0)
    trainer.step._scaler = torch.amp.GradScaler("cpu")  # the CPU's stands in for the GPU's
    with pytest.raises(FloatingPointError, match="however small the loss is scaled"):
        trainer.train()
    assert 25 < trainer.iteration < 35  # 2^16 halved until it is below 1e-4


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_in_parts_is_replayed_in_parts(make_detector, make_loader, tmp_path, parts):
    """Norms and dropout see the parts, so the losses agree only if the replay has them too."""
    detector = make_detector()
    batch = next(iter(make_loader()))
    torch.manual_seed(4)
    save_step(
        tmp_path / "step.pth",
        detector=detector,
        batch=batch,
        random=random_state(),
        iteration=0,
        amp_dtype=None,
        parts=parts,
    )
    trainer = make_trainer(
        detector, [batch], max_iter=1, steps=(), warmup=0, accumulation_steps=parts
    )
    trainer.train()
    report = "\n".join(replay(tmp_path / "step.pth", make_detector(), device="cpu"))
    found = float(re.search(r"loss_square ([\d.e+]+)", report)[1])
    assert found == pytest.approx(trainer.history.latest("loss_square")[0], rel=1e-5)


def test_a_disk_that_is_full_does_not_hide_the_divergence(diverged, monkeypatch, caplog):
    def full(data, path):
        if "batch" in data:
            raise OSError("No space left on device")
        save(data, path)

    save = torch.save
    monkeypatch.setattr(torch, "save", full)
    message, _, _ = diverged()
    assert "iteration 3" in message
    assert "No space left" in caplog.text


@pytest.fixture
def diverged(make_detector, make_loader, tmp_path):
    """A run whose weights overflow at iteration 3; also the weights that step 3 began with."""

    class Overflows(Hook):
        def after_step(self, trainer):
            if trainer.iteration == 2:
                detector.head.weight.data.fill_(math.nan if self.nan else 1e30)
                kept.update({k: v.clone() for k, v in detector.named_parameters()})

        def __init__(self, nan):
            self.nan = nan

    kept = {}
    detector = make_detector()

    def run(nan=True):
        trainer = make_resumable(
            tmp_path,
            detector,
            make_loader,
            period=2,
            steps=(),
            warmup=0,
            hooks=lambda _: [Overflows(nan)],
            output_dir=tmp_path,
        )
        with pytest.raises(FloatingPointError) as caught:
            trainer.train()
        return str(caught.value), detector, kept

    return run


def test_the_message_names_everything_and_the_weights_are_kept(diverged, tmp_path):
    message, detector, kept = diverged()
    assert "iteration 3," in message
    assert "loss_square nan" in message
    assert "learning rate 0.05" in message
    assert "image ids [30, 31, 32, 33]" in message
    assert f"last good checkpoint is {tmp_path / 'model_0000001.pth'}" in message
    assert "--replay-batch" in message
    for name, parameter in detector.named_parameters():
        torch.testing.assert_close(parameter, kept[name], rtol=0, atol=0, equal_nan=True)
    # Broken weights are not saved over the good ones.
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


def test_the_replay_repeats_the_step(diverged, make_detector, tmp_path):
    message, _, _ = diverged(nan=False)
    (file,) = tmp_path.glob("diverged_*.pth")
    assert str(file) in message
    report = "\n".join(replay(file, make_detector(), device="cpu"))
    assert "iteration 3, image ids [30, 31, 32, 33]" in report
    # Dropout draws as it did then, so the finite loss is the same to its last digit.
    told, found = (float(re.search(r"loss_abs ([\d.e+]+)", t)[1]) for t in (message, report))
    assert told == pytest.approx(found, rel=1e-3)
    assert "loss_square inf" in report
    assert "gradients that are not finite: body" in report


def test_the_replay_names_the_first_broken_module(diverged, make_detector, tmp_path):
    diverged()
    (file,) = tmp_path.glob("diverged_*.pth")
    report = replay(file, make_detector(), device="cpu")
    assert "outputs that are not finite: head" in report


def test_a_file_of_another_kind_or_model(diverged, make_detector, tmp_path):
    diverged()
    (file,) = tmp_path.glob("diverged_*.pth")
    with pytest.raises(CheckpointError, match="no batch to replay"):
        replay(tmp_path / "model_0000001.pth", make_detector(), device="cpu")
    with pytest.raises(CheckpointError, match=r"diverged.*does not belong to this model"):
        replay(file, torch.nn.Linear(2, 2), device="cpu")
    with pytest.raises(CheckpointError, match=r"gone\.pth"):
        replay(tmp_path / "gone.pth", make_detector(), device="cpu")

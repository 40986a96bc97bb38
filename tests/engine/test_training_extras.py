"""Ctrl-C, accumulation, averaged weights, losses on other images, and settings after a resume."""

import os
import signal

import pytest
import torch
from torch import nn
from toy_detectors import make_resumable, make_trainer

from cascade_det.engine.averaging import WeightAverage
from cascade_det.engine.checkpoint import Checkpointer
from cascade_det.engine.hooks import EvalHook, Hook, PeriodicCheckpoint
from cascade_det.engine.validation import validation_losses
from cascade_det.errors import CheckpointError, DatasetError
from cascade_det.parallel.interrupts import Interrupted


def resumable(folder, make_detector, make_loader, *, hooks=(), **others):
    return make_resumable(folder, make_detector(), make_loader, hooks=lambda _: hooks, **others)


class Signal(Hook):
    def __init__(self, at, *numbers):
        self.at, self.numbers = at, numbers

    def after_step(self, trainer):
        if trainer.iteration == self.at:
            for number in self.numbers:
                os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_where_it_was(make_detector, make_loader, tmp_path, number):
    before = signal.getsignal(number)
    torch.manual_seed(0)
    whole = resumable(tmp_path / "whole", make_detector, make_loader)
    whole.train()
    torch.manual_seed(0)
    cut = resumable(tmp_path / "cut", make_detector, make_loader, hooks=[Signal(2, number)])
    with pytest.raises(Interrupted, match="after iteration 3"):
        cut.train()
    assert not cut.finished
    assert (tmp_path / "cut" / "last_checkpoint").read_text() == "model_0000003.pth"
    resumed = resumable(tmp_path / "cut", make_detector, make_loader, resume=True)
    resumed.train()
    torch.testing.assert_close(
        resumed.detector.state_dict(), whole.detector.state_dict(), rtol=0, atol=0
    )
    assert signal.getsignal(number) == before


def test_an_interrupted_evaluation_ends_at_once_and_is_made_up_for(
    make_detector, make_loader, tmp_path
):
    evaluated = []

    def evaluate(interrupted):
        if interrupted:
            os.kill(os.getpid(), signal.SIGINT)
        evaluated.append(interrupted)
        return {"AP": 1.0}

    def run(interrupted, resume):
        hooks = [EvalHook(3, lambda: evaluate(interrupted))]
        return resumable(tmp_path, make_detector, make_loader, hooks=hooks, resume=resume)

    trainer = run(True, False)
    with pytest.raises(Interrupted, match="after iteration 2"):
        trainer.train()
    assert evaluated == []
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    resumed = run(False, True)
    resumed.train()
    assert evaluated == [False] * 3  # after iterations 2, 5 and 7


def test_the_second_signal_ends_at_once(make_detector, make_loader, tmp_path):
    hooks = [Signal(2, signal.SIGINT, signal.SIGINT)]
    trainer = resumable(tmp_path, make_detector, make_loader, hooks=hooks)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"


def test_an_error_of_the_data_costs_no_iteration(make_detector, make_loader, tmp_path):
    class Breaks(make_loader):
        def __iter__(self):
            for i, batch in enumerate(super().__iter__()):
                if i == 5:
                    raise DatasetError("broken.jpg")
                yield batch

    torch.manual_seed(0)
    with pytest.raises(DatasetError, match=r"broken\.jpg"):
        resumable(tmp_path, make_detector, Breaks).train()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000004.pth"
    resumed = resumable(tmp_path, make_detector, make_loader, resume=True)
    resumed.train()
    torch.manual_seed(0)
    whole = make_trainer(make_detector(), make_loader())
    whole.train()
    torch.testing.assert_close(
        resumed.detector.state_dict(), whole.detector.state_dict(), rtol=0, atol=0
    )


class Plain(nn.Module):
    """Each image counts alone: no norm over the batch, no random number."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.sizes = []

    def forward(self, batch):
        self.sizes.append(len(batch))
        values = torch.stack([sample["image"] for sample in batch])
        targets = torch.stack([sample["target"] for sample in batch])
        return {"loss_square": ((self.layers(values).squeeze(1) - targets) ** 2).mean()}

    losses = forward


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_give_the_gradients_of_the_whole(make_loader, parts):
    whole, split = Plain(), Plain()
    trainers = [
        make_trainer(whole, make_loader()),
        make_trainer(split, make_loader(), accumulation_steps=parts),
    ]
    for trainer in trainers:
        trainer.train()
    assert set(split.sizes) == {4 // parts}
    torch.testing.assert_close(split.state_dict(), whole.state_dict(), rtol=1e-5, atol=1e-7)
    for name in ("total_loss", "loss_square", "gradient_norm", "lr"):
        one, other = (trainer.history.latest(name) for trainer in trainers)
        assert one == pytest.approx(other, rel=1e-5)


def test_gradient_norm_is_that_of_all_gradients(make_loader):
    detector = Plain()
    trainer = make_trainer(detector, make_loader(), max_iter=1)
    trainer.train()
    flat = torch.cat([parameter.grad.flatten() for parameter in detector.parameters()])
    assert trainer.history.latest("gradient_norm")[0] == pytest.approx(float(flat.norm()), rel=1e-6)


def averaged(folder, make_detector, make_loader, *, resume=False, decay=0.9, hooks=()):
    folder.mkdir(exist_ok=True)
    detector = make_detector()
    checkpointer = Checkpointer(detector, folder)
    checkpointer.resume_or_load("", resume=resume)
    average = WeightAverage(detector, decay)
    checkpointer.model = average.module
    checkpointer.add_checkpointable("training_weights", detector)
    start = checkpointer.start_iter
    hooks = [average, PeriodicCheckpoint(checkpointer, 100, None), *hooks]
    trainer = make_trainer(detector, make_loader(start), start_iter=start, hooks=hooks)
    return trainer, average


def test_average_is_the_recurrence_and_does_not_touch_training(
    make_detector, make_loader, tmp_path
):
    course = []

    class Watch(Hook):
        def after_step(self, trainer):
            course.append({k: v.double() for k, v in trainer.detector.state_dict().items()})

    torch.manual_seed(0)
    trainer, average = averaged(tmp_path, make_detector, make_loader, hooks=[Watch()], decay=0.4)
    trainer.train()
    expected = course[0]
    for t, weights in enumerate(course[1:], start=1):
        keep = min(0.4, (1 + t) / (10 + t))
        expected = {k: keep * v + (1 - keep) * weights[k] for k, v in expected.items()}
    for name, tensor in average.module.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    torch.testing.assert_close(saved["model"], dict(average.module.state_dict()), rtol=0, atol=0)

    torch.manual_seed(0)
    alone = make_trainer(make_detector(), make_loader())
    alone.train()
    torch.testing.assert_close(
        trainer.detector.state_dict(), alone.detector.state_dict(), rtol=0, atol=0
    )


def test_a_resumed_average_equals_an_uninterrupted_one(make_detector, make_loader, tmp_path):
    torch.manual_seed(0)
    whole, expected = averaged(tmp_path / "whole", make_detector, make_loader)
    whole.train()
    torch.manual_seed(0)
    cut, _ = averaged(
        tmp_path / "cut", make_detector, make_loader, hooks=[Signal(3, signal.SIGINT)]
    )
    with pytest.raises(Interrupted):
        cut.train()
    resumed, found = averaged(tmp_path / "cut", make_detector, make_loader, resume=True)
    resumed.train()
    for one, other in (
        (found.module, expected.module),
        (resumed.detector, whole.detector),
    ):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_validation_losses_are_means_over_images(make_loader):
    detector = Plain().train()
    batches = [batch for batch, _ in zip(make_loader(), range(2), strict=False)]
    batches[1] = batches[1][:1]
    before = torch.get_rng_state()
    found = validation_losses(detector, batches)
    images = [sample for batch in batches for sample in batch]
    alone = [detector([image])["loss_square"].item() for image in images]
    assert found["loss_square"] == pytest.approx(sum(alone) / 5, rel=1e-5)
    assert found["total_loss"] == found["loss_square"]
    assert torch.equal(torch.get_rng_state(), before)
    assert detector.training
    assert all(parameter.grad is None for parameter in detector.parameters())
    assert validation_losses(detector, []) == {}


def test_validation_losses_repeat_and_leave_norms_alone(make_detector, make_loader):
    class Sampling(make_detector):
        def losses(self, batch):
            return {**super().losses(batch), "loss_drawn": torch.rand(())}

    detector = Sampling().train()
    batches = [batch for batch, _ in zip(make_loader(), range(3), strict=False)]
    state = {k: v.clone() for k, v in detector.state_dict().items()}
    first = validation_losses(detector, batches)
    torch.rand(7)
    assert validation_losses(detector, batches) == first
    torch.testing.assert_close(dict(detector.state_dict()), state, rtol=0, atol=0)


def test_settings_are_the_new_runs_and_state_is_the_old_ones(make_detector, make_loader, tmp_path):
    def run(**arguments):
        return resumable(tmp_path, make_detector, make_loader, **arguments)

    with pytest.raises(Interrupted):
        run(hooks=[Signal(1, signal.SIGINT)], lr=0.05, decay=1e-4).train()
    momentum = torch.load(tmp_path / "model_0000002.pth", weights_only=True)
    trainer = run(resume=True, lr=0.5, decay=0.1)
    trainer.hooks[0].before_train(trainer)
    (group, *_) = [g for g in trainer.optimizer.param_groups if g["weight_decay"] > 0]
    assert group["weight_decay"] == 0.1
    assert group["lr"] == 0.5  # after the warm-up of three iterations
    state = trainer.optimizer.state[trainer.detector.head.weight]
    saved = momentum["trainer"]["optimizer"]["state"]["head.weight"]
    assert torch.equal(state["momentum_buffer"], saved["momentum_buffer"])


def test_another_optimiser_or_other_parameters_cannot_be_resumed(
    make_detector, make_loader, tmp_path
):
    resumable(tmp_path, make_detector, make_loader).train()
    with pytest.raises(CheckpointError, match=r"checkpoint is SGD.*OPTIMIZER asks for AdamW"):
        resumable(
            tmp_path, make_detector, make_loader, name="AdamW", resume=True, max_iter=9
        ).train()

    class Frozen(make_detector):
        def __init__(self):
            super().__init__()
            self.head.requires_grad_(False)

    with pytest.raises(CheckpointError, match=r"trained head\.bias, head\.weight .*trains nothing"):
        resumable(tmp_path, Frozen, make_loader, resume=True, max_iter=9).train()

    content = torch.load(tmp_path / "model_final.pth", weights_only=True)
    content["trainer"]["optimizer"]["state"]["head.weight"]["momentum_buffer"] = torch.ones(2, 3)
    torch.save(content, tmp_path / "model_final.pth")
    with pytest.raises(CheckpointError, match=r"momentum_buffer of head\.weight is \(2, 3\)"):
        resumable(tmp_path, make_detector, make_loader, resume=True, max_iter=9).train()

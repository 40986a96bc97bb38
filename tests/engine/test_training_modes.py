"""Progress of training schedules, and a detector whose exits alone are trained."""

import pytest
import torch
from torch import nn
from toy_detectors import make_trainer

from cascade_det.core.training_schedule import TrainingSchedule
from cascade_det.engine.replay import replay
from cascade_det.engine.step_file import save_step
from cascade_det.engine.training_modes import freeze_detector, progress_of, training_mode
from cascade_det.engine.training_state import random_state
from cascade_det.errors import ConfigError


class Heads(nn.Module):
    """Where a detector has its regime and its exits."""

    def __init__(self, regime, exits):
        super().__init__()
        self.regime = regime
        self.exits = exits
        self.inner = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout(0.5))

    def forward(self, values):
        assert self.training
        return self.exits(self.inner(values)).squeeze(1)


class WithRegime(nn.Module):
    """The toy of these tests in the place of a backbone."""

    def __init__(self, toy, regime, exits):
        super().__init__()
        self.toy = toy
        self.roi_heads = Heads(regime, exits)
        self.seen = []

    def forward(self, batch):
        self.seen.append(self.roi_heads.regime.progress)
        values = torch.stack([sample["image"] for sample in batch])
        features = self.toy.head(self.toy.body(values))
        return {"loss_exit_toy": (self.roi_heads(features) ** 2).mean()}


@pytest.fixture
def make(make_detector):
    def build(*, exits_alone=False, exits=True):
        regime = TrainingSchedule(num_stages=2, exits_alone=exits_alone)
        parts = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5)) if exits else None
        return WithRegime(make_detector(), regime, parts)

    return build


def test_progress_is_a_share_of_all_iterations_also_after_a_resume(make, make_loader):
    detector = make()
    make_trainer(detector, make_loader(), max_iter=4, accumulation_steps=2).train()
    assert detector.seen == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    resumed = make()
    make_trainer(resumed, make_loader(2), max_iter=4, start_iter=2).train()
    assert resumed.seen == [0.5, 0.75]


def test_a_detector_without_regime_needs_no_progress(make_detector, make_loader):
    detector = make_detector()
    make_trainer(detector, make_loader()).train()
    assert progress_of(detector) == 0
    freeze_detector(detector)
    assert all(p.requires_grad for p in detector.parameters())


def test_a_frozen_detector_keeps_every_tensor(make, make_loader):
    detector = make(exits_alone=True)
    freeze_detector(detector)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    make_trainer(detector, make_loader()).train()
    changed = {n for n, v in detector.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {"roi_heads.exits.0.weight", "roi_heads.exits.0.bias"}


def test_norms_and_dropout_of_a_frozen_detector_are_in_evaluation(make):
    detector = make(exits_alone=True)
    wrapped = nn.ModuleDict({"module": detector})
    training_mode(wrapped)
    modes = {name for name, module in wrapped.named_modules() if module.training}
    exits = {"module.roi_heads.exits" + part for part in ("", ".0", ".1")}
    assert modes == {"", "module", "module.roi_heads", *exits}
    plain = make()
    training_mode(plain.eval())
    assert all(module.training for module in plain.modules())


def test_nothing_to_train_is_an_error(make):
    with pytest.raises(ConfigError, match=r"FREEZE_DETECTOR.*EXIT\.LEARNED"):
        freeze_detector(make(exits_alone=True, exits=False))


def test_a_replay_has_the_progress_and_the_modes_of_the_step(make, make_loader, tmp_path):
    detector = make(exits_alone=True)
    freeze_detector(detector)
    detector.roi_heads.regime.progress = 0.75
    batch, random = next(iter(make_loader())), random_state()
    training_mode(detector)
    loss = detector(batch)["loss_exit_toy"].item()
    path = tmp_path / "step.pth"
    save_step(path, detector=detector, batch=batch, random=random, iteration=3, amp_dtype=None)
    other = make(exits_alone=True)
    lines = replay(path, other, device="cpu")
    assert f"loss_exit_toy {loss:.6g}" in lines
    assert other.seen == [0.75]

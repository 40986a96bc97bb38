"""A detector small enough to see through, with batches and a trainer."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from cascade_det.core.modes import in_evaluation_mode
from cascade_det.core.structures import CascadeStats, Detections, DetectorOutput
from cascade_det.engine.checkpoint import Checkpointer
from cascade_det.engine.hooks import PeriodicCheckpoint
from cascade_det.engine.solver import build_optimizer, build_scheduler
from cascade_det.engine.step import TrainingStep
from cascade_det.engine.trainer import Trainer


class ToyDetector(nn.Module):
    """Regresses a number with dropout, so that training depends on torch's random numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(8, 1)
        self.metrics: dict[str, float] = {}
        self.modes: list[bool] = []

    def forward(self, batch: list[dict]) -> dict[str, Tensor]:
        return self.losses(batch)

    def losses(self, batch: list[dict]) -> dict[str, Tensor]:
        values = torch.stack([sample["image"] for sample in batch])
        targets = torch.stack([sample["target"] for sample in batch])
        error = self.head(self.body(values)).squeeze(1).float() - targets
        self.metrics = {"toy/error": float(error.detach().abs().mean())}
        return {"loss_square": (error**2).mean(), "loss_abs": 0.1 * error.abs().mean()}

    @in_evaluation_mode
    def detect(self, batch: list[dict], *, stages: bool = False, timer=None) -> DetectorOutput:
        self.modes.append(self.training)
        if timer is not None:
            with timer.part("backbone"):
                pass
        empty = Detections(
            torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=int), torch.zeros(0, dtype=int)
        )
        return DetectorOutput([empty for _ in batch], CascadeStats([0], [{}]))


class ToyLoader:
    """Batch i is a function of i alone."""

    def __init__(self, start: int = 0) -> None:
        self.start = start

    def __iter__(self) -> Iterator[list[dict]]:
        i = self.start
        while True:
            # Starting a loader may draw from the global generator, as DataLoader's does.
            generator = torch.Generator().manual_seed(i)
            image = torch.randn(4, 4, generator=generator)
            yield [
                {"image": row, "target": row.sum(), "image_id": 10 * i + k}
                for k, row in enumerate(image)
            ]
            i += 1


def make_trainer(
    detector,
    loader,
    *,
    max_iter=8,
    start_iter=0,
    hooks=(),
    lr=0.05,
    name="SGD",
    decay=1e-4,
    steps=(5,),
    warmup=3,
    **others,
) -> Trainer:
    """A trainer; ``others`` are arguments of its step."""
    optimizer = build_optimizer(detector, name=name, base_lr=lr, weight_decay=decay)
    scheduler = build_scheduler(optimizer, max_iter=max_iter, steps=steps, warmup_iters=warmup)
    step = TrainingStep(detector, optimizer, max_iter=max_iter, **others)
    return Trainer(step, loader, scheduler, max_iter=max_iter, start_iter=start_iter, hooks=hooks)


def make_resumable(
    folder,
    detector,
    make_loader,
    *,
    resume=False,
    period=100,
    max_to_keep=None,
    hooks=lambda _: (),
    **others,
) -> Trainer:
    """A trainer with checkpoints; ``hooks`` makes those after them, of the checkpointer."""
    folder.mkdir(exist_ok=True)
    checkpointer = Checkpointer(detector, folder)
    checkpointer.resume_or_load("", resume=resume)
    start = checkpointer.start_iter
    saving = PeriodicCheckpoint(checkpointer, period, max_to_keep)
    return make_trainer(
        detector,
        make_loader(start),
        start_iter=start,
        hooks=[saving, *hooks(checkpointer)],
        **others,
    )


@pytest.fixture
def make_detector() -> type[ToyDetector]:
    return ToyDetector


@pytest.fixture
def make_loader() -> type[ToyLoader]:
    return ToyLoader

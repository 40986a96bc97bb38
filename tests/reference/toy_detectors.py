"""A detector small enough to see through, and batches for it."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from cascade_det.core.structures import CascadeStats, Detections, DetectorOutput


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


@pytest.fixture
def make_detector() -> type[ToyDetector]:
    return ToyDetector


@pytest.fixture
def make_loader() -> type[ToyLoader]:
    return ToyLoader

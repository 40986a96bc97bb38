"""The ranges of layers, of a detector that is two layers."""

from types import SimpleNamespace

import pytest
import torch
from detection_rows import detections_of
from torch import nn

from cascade_det.engine.int8 import Ranges


class Planted(nn.Module):
    """Runs two layers on the numbers of a batch."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(1, 1), nn.Linear(1, 1)
        self.calls = []
        self.cascade = SimpleNamespace(exits="exits")
        for layer, scale in ((self.first, -2.0), (self.second, 3.0)):
            nn.init.constant_(layer.weight, scale)
            nn.init.zeros_(layer.bias)

    def set_exits(self, exits):
        self.cascade.exits = exits

    @torch.no_grad()
    def detect(self, batch):
        self.calls.append(self.cascade.exits)
        self.second(self.first(batch[0]["image"]).relu())
        return SimpleNamespace(detections=[detections_of(((0, 0, 8, 8), 0.9, 0))])


def test_grids_are_percentiles_and_serve_copies():
    torch.manual_seed(0)
    x = torch.rand(1_000_000, 1) * 2 - 1  # to [-2, 2], and by a ReLU to [0, 2]
    x[0], x[1] = 1e6, -1e6  # two of many are clipped
    ranges = Ranges([[{"image": x}], [{"image": x}]])
    detector, copied = Planted(), Planted()
    for which in (detector, copied):
        of = ranges.of(which)
        for grid, low, high in (
            (of.of_input(which.first), -1, 1),
            (of.of_output(which.first, False), -2, 2),
            (of.of_output(which.first, True), 0, 2),
            (of.of_input(which.second), 0, 2),
            (of.of_output(which.second, False), 0, 6),
        ):
            assert 255 * grid.scale == pytest.approx(high - low, rel=0.02)
            assert -grid.scale * grid.zero_point == pytest.approx(low, abs=2 * grid.scale)
    # Measured without exits, so that all layers are reached; compared with them.
    assert (detector.calls, copied.calls) == ([None, None, "exits", "exits"], [])
    assert len(ranges.detections) == 2
    assert not detector.first._forward_hooks
    assert "finds 100.0 % of 2 detections" in ranges.compare(copied)


def test_a_layer_that_no_image_reached_has_some_grid():
    detector = Planted()
    ranges = Ranges([[{"image": torch.empty(0, 1)}]]).of(detector)
    assert ranges.of_input(detector.first).zero_point == 0

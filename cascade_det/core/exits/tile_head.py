"""The learned part of the tile gate: which tiles of the finest map the RPN needs.

Shapes: N images, C channels, an H x W map of P x Q tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.layers.tiles import TILE


class TileHead(nn.Module):
    """A small network on each cell of the RPN's hidden map of the level after the finest.

    That map, of twice the stride, is computed anyway. A tile has the logit of its best cell.
    Everything is computed in float32, also under autocast.

    Args:
        channels: C of the hidden map.

    Attributes:
        norm: brings channels to unit size, by statistics of the training.
    """

    hidden_width = 32

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, affine=False)
        self.fc = nn.Linear(channels, self.hidden_width)
        self.logit = nn.Linear(self.hidden_width, 1)
        nn.init.zeros_(self.logit.weight)
        nn.init.zeros_(self.logit.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the logits of tiles, float32 ``[N, P, Q]``."""
        images, channels, height, width = hidden.shape
        with torch.autocast(hidden.device.type, enabled=False):
            cells = hidden.permute(0, 2, 3, 1).reshape(-1, channels).float()
            logits = self.logit(F.relu(self.fc(self.norm(cells))))
            return F.max_pool2d(logits.view(images, height, width), TILE // 2)

    def probabilities(self, hidden: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the scores of tiles, float32 ``[N, P, Q]`` in [0, 1].

        For tiles to hold the cell of an anchor that ends as a detection of the full cascade. They
        rank tiles, but are not calibrated: training weights these tiles more.
        """
        return torch.sigmoid(self(hidden))

"""Box head and predictor of one stage: crops to class logits and box deltas."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cascade_det.layers.conv_norm import ConvNorm


class ConvFCBoxHead(nn.Sequential):
    """3x3 convolutions, then linear layers, each with a ReLU.

    Layers, names and initialisation of Detectron2's ``FastRCNNConvFCHead``.

    Args:
        in_channels: C of the crops.
        pooled_size: P, bins per side of the crops.
        conv_dims: output channels of each convolution; may be empty.
        fc_dims: output width of each linear layer; may be empty.
        norm: norm of the convolutions, see ``cascade_det.layers.make_norm``.

    Raises:
        ValueError: without any layer.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        pooled_size: int,
        conv_dims: tuple[int, ...] = (),
        fc_dims: tuple[int, ...] = (1024, 1024),
        norm: str = "",
    ) -> None:
        super().__init__()
        if not conv_dims and not fc_dims:
            raise ValueError("a box head needs at least one convolution or linear layer")
        channels = in_channels
        for i, width in enumerate(conv_dims, start=1):
            conv = ConvNorm(channels, width, 3, norm=norm)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"conv_relu{i}", nn.ReLU())
            channels = width
        features = channels * pooled_size * pooled_size
        self.add_module("flatten", nn.Flatten())
        for i, width in enumerate(fc_dims, start=1):
            fc = nn.Linear(features, width)
            nn.init.kaiming_uniform_(fc.weight, a=1)
            nn.init.zeros_(fc.bias)
            self.add_module(f"fc{i}", fc)
            self.add_module(f"fc_relu{i}", nn.ReLU())
            features = width
        self.out_features = features

    def forward(self, pooled: Tensor) -> Tensor:
        """``[R, C, P, P]`` to ``[R, out_features]``."""
        return super().forward(pooled)


class BoxPredictor(nn.Module):
    """Class logits and box deltas of each region (Fast R-CNN, arXiv 1504.08083, section 2).

    Args:
        in_features: width of the box head's output.
        num_classes: K.
        cls_agnostic_bbox_reg: whether to predict one box for all classes, or one per class.
    """

    def __init__(
        self, *, in_features: int, num_classes: int, cls_agnostic_bbox_reg: bool = True
    ) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_features, num_classes + 1)
        self.bbox_pred = nn.Linear(in_features, 4 if cls_agnostic_bbox_reg else 4 * num_classes)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """``[R, F]`` to logits ``[R, K + 1]`` and deltas ``[R, 4]`` or ``[R, 4 K]``."""
        features = torch.flatten(features, start_dim=1)  # for heads without linear layers
        return self.cls_score(features), self.bbox_pred(features)

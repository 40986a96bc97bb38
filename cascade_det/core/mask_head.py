"""Mask head: crops to the mask of one class each (Mask R-CNN, arXiv 1703.06870, section 3).

Shapes: R regions, C channels, P bins per side of a crop, M = 2 P cells per side of a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cascade_det.layers.conv_norm import ConvNorm


class ConvUpsampleMaskHead(nn.Module):
    """3x3 convolutions, a 2x2 deconvolution and a 1x1 convolution, with ReLUs between them.

    Layers, names and initialisation of Detectron2's ``MaskRCNNConvUpsampleHead``.

    Args:
        in_channels: C of the crops.
        conv_dims: output channels of each 3x3 convolution; may be empty.
        upsampled_dim: output channels of the deconvolution.
        num_masks: masks per region: K, one for each class, or 1 for all classes.
        norm: norm of the convolutions, see ``cascade_det.layers.conv_norm.make_norm``.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        conv_dims: tuple[int, ...],
        upsampled_dim: int,
        num_masks: int,
        norm: str = "",
    ) -> None:
        super().__init__()
        self.num_convs = len(conv_dims)
        channels = in_channels
        for i, width in enumerate(conv_dims, start=1):
            self.add_module(f"mask_fcn{i}", ConvNorm(channels, width, 3, norm=norm))
            channels = width
        self.deconv = nn.ConvTranspose2d(channels, upsampled_dim, kernel_size=2, stride=2)
        self.predictor = nn.Conv2d(upsampled_dim, num_masks, kernel_size=1)
        for layer in (*self.convs(), self.deconv):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.predictor.weight, std=0.001)
        assert self.predictor.bias is not None
        nn.init.zeros_(self.predictor.bias)

    def convs(self) -> list[nn.Conv2d]:
        """The 3x3 convolutions, in order."""
        return [getattr(self, f"mask_fcn{i}") for i in range(1, self.num_convs + 1)]

    def forward(self, pooled: Tensor, classes: Tensor) -> Tensor:
        """Mask logits of one class per region.

        Only this class is computed: of 80 classes, the others take as long as a convolution.

        Args:
            pooled: ``[R, C, P, P]``.
            classes: int64 ``[R]`` in ``[0, K)``.

        Returns:
            float32 ``[R, M, M]``.
        """
        x = pooled
        for conv in self.convs():
            x = torch.relu(conv(x))
        x = torch.relu(self.deconv(x))  # [R, C, M, M]
        return class_logits(self.predictor, x, classes)


def class_logits(predictor: nn.Conv2d, x: Tensor, classes: Tensor) -> Tensor:
    """Logits of one class per region by a 1x1 convolution.

    Args:
        predictor: ``C`` to K masks, or to 1 for all classes.
        x: ``[R, C, M, M]``.
        classes: int64 ``[R]``.

    Returns:
        float32 ``[R, M, M]``.
    """
    size = x.shape[-1]
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # [R, M * M, C]
    return pixel_logits(predictor, pixels, classes).view(-1, size, size)


def pixel_logits(predictor: nn.Conv2d, pixels: Tensor, classes: Tensor) -> Tensor:
    """``class_logits`` of Q pixels ``[R, Q, C]`` per region: float32 ``[R, Q]``."""
    weight, bias = predictor.weight.flatten(1), predictor.bias  # [K, C]
    assert bias is not None
    rows = torch.zeros_like(classes) if len(weight) == 1 else classes
    logits = torch.baddbmm(bias[rows][:, None, None], pixels, weight[rows][:, :, None])
    return logits.squeeze(2).float()

"""One level of the CASCADE decoder at some pixels, for inference.

Shapes: N images, n pixels, C channels of the level, D of the coarser one, F inside the attention
gate. A fused map has C channels, or 2 C by ``concat``.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.backbones.cascade_decoder import CascadeDecoder
from cascade_det.backbones.fast_upconv import doubling_kernels
from cascade_det.layers.folding import fold_norms
from cascade_det.layers.winograd import WinogradConv2d
from cascade_det.segmentation.pixel_rows import PixelRows, PixelSet, dilate, map_rows

_CONVOLUTIONS = (nn.Conv2d, WinogradConv2d)  # the latter in an optimised decoder
# How far around a decoded pixel: two 3x3 convolutions need the attended map, 7x7 spatial attention
# also the fused map, whose own 3x3 convolution needs the upsampled coarser map.
ATTENDED, FUSED, UPSAMPLED = 2, 5, 6


class SparseLevel:
    """One level of a decoder in evaluation mode, at chosen pixels.

    These equal the pixels of ``CascadeDecoder.refine`` up to rounding, given the same gates of
    channel attention and every pixel of the coarser map within reach.

    Args:
        decoder: its weights are copied; build again after they change.
        level: 1 is the finest; not the coarsest.
        dense_gates: channel attention pools over a whole map. If true, the fused map is computed
            at all pixels of images with a wanted one; else the pooling is over those that are
            computed anyway, within ``FUSED`` of a wanted pixel.
    """

    def __init__(self, decoder: CascadeDecoder, level: int, *, dense_gates: bool) -> None:
        self.dense_gates = dense_gates
        self.concat = decoder.fuse == "concat"
        up, gate, self.channels, block = (
            _folded(decoder.get_submodule(f"{name}{level}"))
            for name in ("Up", "AG", "CA", "ConvBlock")
        )
        self.spatial = _folded(decoder.SA)
        self.up_bias = up.up[0].bias
        self.up_weight = _taps(up.up[0].weight)
        self.doubling_weights = [_taps(x) for x in doubling_kernels(up.up[0].weight)]
        self.compare_up, self.compare_skip, self.psi = (
            (conv.weight.flatten(1).t(), conv.bias)
            for conv in (gate.W_g[0], gate.W_x[0], gate.psi[0])
        )
        convs: list[Any] = [conv for conv in block.conv if isinstance(conv, _CONVOLUTIONS)]
        self.convs = [(_taps(conv.weight), conv.bias) for conv in convs]

    def __call__(self, coarser: PixelRows, skip: Tensor, wanted: Tensor) -> PixelRows:
        """Decode some pixels.

        Args:
            coarser: the decoded map of the level before; pixels that it lacks count as zero.
            skip: the encoder's map, ``[N, C, H, W]``.
            wanted: bool ``[N, H, W]``.

        Returns:
            ``[n, C]`` of the wanted pixels.
        """
        near = dilate(wanted, ATTENDED)
        if self.dense_gates:
            needed = wanted.flatten(1).any(1)[:, None, None].expand_as(wanted)
        else:
            needed = dilate(near, FUSED - ATTENDED)
        doubled = skip.shape[2:] == tuple(2 * side for side in coarser.pixels.shape[1:])
        pixels = PixelSet(needed, step=2 if doubled else 1)
        fused = self._fuse(self._upsample(coarser, pixels), map_rows(skip)[pixels.flat])
        x = self._attend(fused, pixels, PixelSet(near))
        for (weight, bias), mask in zip(self.convs, (dilate(wanted, 1), wanted), strict=True):
            y = PixelRows(PixelSet(mask), len(bias), x.rows)
            x.convolve(y.pixels.neighbours(), weight, bias, y.rows)
            x = y
        return x

    def _upsample(self, coarser: PixelRows, pixels: PixelSet) -> Tensor:
        """Nearest neighbours and their 3x3 convolution: ``[n, C]``."""
        up = self.up_bias.new_empty(len(pixels), len(self.up_bias))
        if len(pixels.counts) == 1:
            coarser.convolve(_nearest(pixels, coarser), self.up_weight, self.up_bias, up)
            return up
        groups = (x.split(pixels.counts) for x in (_doubled(pixels, coarser), up))
        for places, out, weight in zip(*groups, self.doubling_weights, strict=True):
            coarser.convolve(places, weight, self.up_bias, out)
        return up

    def _fuse(self, up: Tensor, skip: Tensor) -> Tensor:
        """``[n, C]`` twice to the fused ``[n, C]``, or ``[n, 2 C]``."""
        hidden = torch.addmm(self.compare_up[1] + self.compare_skip[1], up, self.compare_up[0])
        hidden.addmm_(skip, self.compare_skip[0]).relu_()
        weight, bias = self.psi
        gated = skip * torch.addmm(bias, hidden, weight).sigmoid_()
        return torch.cat([gated, up], dim=1) if self.concat else gated.add_(up)

    def _attend(self, fused: Tensor, pixels: PixelSet, near: PixelSet) -> PixelRows:
        """Channel and spatial attention: fused rows to the attended ones nearby."""
        images, height, width = pixels.shape
        gates = self._channel_gates(fused, pixels)
        x = PixelRows(pixels, fused.shape[1], fused)
        torch.mul(fused, gates if images == 1 else gates[pixels.images], out=x.rows)
        # The two pooled maps are small enough to be whole: zero where nothing is computed.
        pooled = fused.new_zeros(2, images * height * width)
        pooled[:, pixels.flat] = torch.stack([x.rows.mean(1), x.rows.amax(1)])
        pooled = pooled.view(2, images, height, width).transpose(0, 1)
        weights: Tensor = self.spatial.conv1(pooled).sigmoid_().flatten()
        attended = PixelRows(near, fused.shape[1], fused)
        torch.mul(x.at(near.places()), weights[near.flat, None], out=attended.rows)
        return attended

    def _channel_gates(self, fused: Tensor, pixels: PixelSet) -> Tensor:
        """Gates ``[N, C]`` from the mean and maximum over the rows of each image."""
        images = pixels.shape[0]
        total = fused.new_zeros(images, fused.shape[1])
        top = torch.full_like(total, -torch.inf)
        # A loop over images on purpose: an indexed maximum takes five times as long.
        runs = [part.bincount(minlength=images) for part in pixels.images.split(pixels.counts)]
        for run, rows in enumerate(fused.split(torch.cat(runs).tolist())):
            if len(rows):
                image = run % images
                total[image] += rows.sum(0)
                torch.maximum(top[image], rows.amax(0), out=top[image])
        mean = total / sum(runs).clamp(min=1)[:, None]
        vectors = torch.cat([mean, top])[:, :, None, None]  # [2 N, C, 1, 1]
        hidden = F.relu(self.channels.fc1(vectors))
        gates: Tensor = self.channels.fc2(hidden).view(2, images, -1).sum(0).sigmoid()
        return gates


def _folded(part: nn.Module) -> Any:
    part = deepcopy(part).requires_grad_(False).eval()
    fold_norms(part)
    return part


def _taps(weight: Tensor) -> Tensor:
    """A kernel ``[K, C, h, w]`` as the factor of neighbourhoods: ``[K, h w C]``."""
    return weight.permute(0, 2, 3, 1).flatten(1).contiguous()


def _doubled(pixels: PixelSet, coarser: PixelRows) -> Tensor:
    """The 2x2 places of a map of half the size below the 3x3 pixels around each: ``[n, 4]``."""
    _, height, width = coarser.pixels.shape
    corner = pixels.images * (height + 2) + (pixels.y + 1) // 2
    corner = corner * (width + 2) + (pixels.x + 1) // 2
    line = width + 2
    return corner[:, None] + corner.new_tensor([0, 1, line, line + 1])


def _nearest(pixels: PixelSet, coarser: PixelRows) -> Tensor:
    """The places of a map of any size below the 3x3 pixels around each: ``[n, 9]``."""
    _, height, width = coarser.pixels.shape
    y = _sources(pixels.shape[1], height, pixels.y)  # [n, 3]
    x = _sources(pixels.shape[2], width, pixels.x)
    lines = pixels.images[:, None] * (height + 2) + y
    return (lines[:, :, None] * (width + 2) + x[:, None, :]).flatten(1)


def _sources(size: int, coarse: int, centre: Tensor) -> Tensor:
    """Of a pixel and its two neighbours on a line, the nearest ones on the padded coarse line."""
    line = torch.arange(1.0, coarse + 1, device=centre.device)
    # By the operator itself, so that its rounding is the same.
    inside = F.interpolate(line[None, None], size, mode="nearest")[0, 0].long()
    padded = F.pad(F.pad(inside, (1, 0)), (0, 1), value=coarse + 1)
    return torch.stack([padded[centre + shift] for shift in range(3)], dim=1)

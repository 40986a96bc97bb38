"""Maps of which only some pixels are computed: a matrix with a row of channels per pixel.

Shapes: N images, ``[H, W]`` pixels, n of them computed, C channels in, K out. Places number the
pixels of ``[N, H + 2, W + 2]``: maps with a border of one pixel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade_det.layers.products import linear_relu

# Gathered neighbourhoods are multiplied while the cores have them in their caches.
_CHUNK_BYTES = 1 << 22
_STEPS = 8


class PixelSet:
    """Some pixels of a batch of maps, in a fixed order.

    Args:
        mask: bool ``[N, H, W]``.
        step: groups the pixels by ``(y % step, x % step)``; inside a group they are in order.

    Attributes:
        shape: N, H, W.
        flat: int64 ``[n]``, indices into ``[N H W]``.
        images, y, x: int64 ``[n]``.
        counts: pixels in each of the ``step^2`` groups.
    """

    def __init__(self, mask: Tensor, step: int = 1) -> None:
        self.shape = _, height, width = tuple(mask.shape)
        indices = torch.arange(mask.numel(), device=mask.device).view(mask.shape)
        parts = [
            indices[:, y::step, x::step][mask[:, y::step, x::step]]
            for y in range(step)
            for x in range(step)
        ]
        self.flat = torch.cat(parts)
        self.counts = [len(part) for part in parts]
        self.x = self.flat % width
        lines = self.flat // width
        self.y = lines % height
        self.images = lines // height

    def __len__(self) -> int:
        return len(self.flat)

    def places(self, dy: int = 0, dx: int = 0) -> Tensor:
        """The places of the pixels this far from each: int64 ``[n]``."""
        _, height, width = self.shape
        return (self.images * (height + 2) + self.y + dy + 1) * (width + 2) + self.x + dx + 1

    def neighbours(self) -> Tensor:
        """The places of the 3x3 pixels around each, row by row: int64 ``[n, 9]``."""
        line = self.shape[2] + 2
        around = [y * line + x for y in (-1, 0, 1) for x in (-1, 0, 1)]
        return self.places()[:, None] + self.flat.new_tensor(around)


class PixelRows:
    """The channels of the pixels of a set; all other pixels and the border read as zero.

    Args:
        pixels: n of them.
        channels: C.
        like: gives dtype and device.

    Attributes:
        rows: ``[n, C]``, to be filled.
    """

    def __init__(self, pixels: PixelSet, channels: int, like: Tensor) -> None:
        self.pixels = pixels
        images, height, width = pixels.shape
        self._rows = like.new_empty(len(pixels) + 1, channels)
        self._rows[-1] = 0
        self.rows = self._rows[:-1]
        self._row_at = pixels.flat.new_full((images * (height + 2) * (width + 2),), len(pixels))
        self._row_at[pixels.places()] = torch.arange(len(pixels), device=like.device)

    @staticmethod
    def of_map(x: Tensor) -> PixelRows:
        """All pixels of ``[N, C, H, W]``."""
        everything = x.new_ones((len(x), *x.shape[2:]), dtype=torch.bool)
        found = PixelRows(PixelSet(everything), x.shape[1], x)
        found.rows.copy_(map_rows(x))
        return found

    def at(self, places: Tensor) -> Tensor:
        """``[m]`` places to rows ``[m, C]``."""
        return self._rows.index_select(0, self._row_at.index_select(0, places))

    def convolve(self, places: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
        """A convolution with ReLU at some pixels, as products of their gathered neighbourhoods.

        Args:
            places: int64 ``[m, t]``, the t neighbours that each pixel's kernel covers.
            weight: ``[K, t C]``.
            bias: ``[K]``.
            out: ``[m, K]``, gets the result.
        """
        size = max(_STEPS, _CHUNK_BYTES // (weight.shape[1] * weight.element_size()))
        for some, result in zip(places.split(size), out.split(size), strict=True):
            # Few different numbers of rows, see linear_relu; place 0 is on the border.
            some = F.pad(some, (0, 0, 0, -len(some) % (size // _STEPS)))
            gathered = self.at(some.flatten()).view(len(some), -1)  # [m, t C]
            linear_relu(gathered, weight, bias, result)


def map_rows(x: Tensor) -> Tensor:
    """``[N, C, H, W]`` to ``[N H W, C]``."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def dilate(mask: Tensor, radius: int) -> Tensor:
    """The pixels of ``[N, H, W]`` within ``radius`` rows and columns of a true one."""
    for dim in (1, 2):
        source, mask = mask, mask.clone()
        size = mask.shape[dim]
        for shift in range(1, min(radius, size - 1) + 1):
            length = size - shift
            mask.narrow(dim, shift, length).logical_or_(source.narrow(dim, 0, length))
            mask.narrow(dim, 0, length).logical_or_(source.narrow(dim, shift, length))
    return mask

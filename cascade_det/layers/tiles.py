"""A map that is computed in tiles, and only where it is read.

Shapes: N images, C channels, an H x W map of P x Q tiles, K tiles in a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.layers.windows import convolve_windows, takes_windows
from cascade_det.layers.winograd import WinogradConv2d
from cascade_det.layers.winograd_blocks import (
    BLOCK,
    cells_of_blocks,
    convolve_blocks,
    takes_blocks,
)

TILE = 8  # cells per side
# Tiles cost 1.1 to 1.2 times as much per cell as a whole map, measured: an image is computed as a
# whole from this share on.
WHOLE_FROM = 0.85
# Those of the RPN have a border: with more of them, and if regions then read all others, a gate
# would take longer than the whole map.
WHOLE_FROM_WITH_BORDER = 0.4
# oneDNN prepares a kernel for each number of windows: few different ones, that stay in the cache.
_MOST_WINDOWS = 64
_WINDOW_STEP = 8


class TiledMap:
    """A 3x3 convolution of a map, computed where it is read.

    Not for several threads at a time.

    Args:
        source: ``[N, C, H, W]``, H and W multiples of ``TILE``.
        conv: of which ``takes_windows`` is true.
        out: ``[N, K, H, W]``, channels-last; gets the result.

    Attributes:
        data: ``out``. Only computed tiles have values.
        computed: bool ``[N, P, Q]``, the tiles that are computed.
        opened: bool ``[N, P, Q]``, the tiles that the RPN reads.
        as_a_whole: bool ``[N]``, the images of which all tiles were computed at once.
        measured: gives a context in which tiles are computed, for their time.
    """

    def __init__(self, source: Tensor, conv: nn.Module, out: Tensor) -> None:
        self._source, self._conv = source, conv
        self.data = out
        images, _, height, width = source.shape
        self.computed = torch.zeros(
            images, height // TILE, width // TILE, dtype=torch.bool, device=source.device
        )
        self.opened = torch.ones_like(self.computed)
        self.as_a_whole = torch.zeros(images, dtype=torch.bool, device=source.device)
        self.measured: Callable[[], AbstractContextManager[None]] = nullcontext
        self._has_all = False  # as far as is known
        # Those that are computed, bool [N, H / BLOCK, W / BLOCK]; windows have none.
        self._blocks = None
        if takes_blocks(conv, source) and out.dtype == source.dtype:
            self._blocks = _blocks_of(self.computed)
        self._copies: list[tuple[Tensor, Tensor]] = []

    @staticmethod
    def suits(source: Tensor, conv: nn.Module) -> bool:
        """Whether such a map can be computed in tiles."""
        return (
            not (torch.is_grad_enabled() or torch.jit.is_tracing() or torch.compiler.is_compiling())
            and not torch.is_autocast_enabled(source.device.type)
            and source.shape[2] % TILE == source.shape[3] % TILE == 0
            and takes_windows(conv)
        )

    @property
    def shape(self) -> torch.Size:
        """``(N, K, H, W)``."""
        return self.data.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the result."""
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.data.device

    def also_write_to(self, table: Tensor, first_rows: Tensor) -> None:
        """Write tiles that are computed later to a copy of the map too.

        Args:
            table: ``[rows, K]``, a row for each pixel.
            first_rows: int64 ``[N]``, the first row of each image.
        """
        self._copies.append((table, first_rows))

    def whole(self) -> Tensor:
        """The map ``[N, K, H, W]`` with all tiles computed."""
        self.compute(torch.ones_like(self.computed))
        return self.data

    def recompute(self, images: Sequence[bool]) -> Tensor:
        """The map ``[N, K, H, W]``, of the chosen images computed at once, as without tiles.

        Tiles differ from that by rounding. Its time is not ``measured``.
        """
        self._copies.clear()  # their readers are done
        with self._writing():
            self._compute_whole(images)
        return self.data

    def compute(self, wanted: Tensor) -> None:
        """Compute the tiles of ``wanted``, bool ``[N, P, Q]``, that are not computed yet."""
        if self._has_all:
            return  # without a wait for a GPU
        missing = wanted & ~self.computed
        counts = count_tiles(missing)
        if not any(counts):
            return
        least = WHOLE_FROM * missing[0].numel()
        whole = [count >= least for count in counts]
        with self._computing():
            if any(whole):
                self._compute_whole(whole)
                as_a_whole = missing.flatten(1).sum(dim=1) >= least  # [N]
                missing &= ~as_a_whole[:, None, None]
                counts = [0 if done else count for count, done in zip(counts, whole, strict=True)]
                self.as_a_whole = self.as_a_whole | as_a_whole
                self._has_all = all(whole)
            if self._blocks is not None:
                self._compute_blocks(_blocks_of(missing), self._blocks)
            else:
                for tiles in windows_of(missing, sum(counts)):
                    result = convolve_windows(self._cut(tiles, TILE + 2), self._conv)
                    self._write(tiles, result)
        self.computed = self.computed | wanted | self.as_a_whole[:, None, None]

    def convolve(
        self, conv: nn.Module, tiles: Tensor, count: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Convolve the map at some tiles, some at a time; computes them and what is beside them.

        Args:
            conv: of which ``takes_windows`` is true.
            tiles: bool ``[N, P, Q]``, of images that are not computed as a whole.
            count: how many there are.

        Yields:
            Pixels ``[R, K']`` of the result, and their indices in the pixels of N maps.
        """
        _, _, height, width = self.shape
        if self._blocks is None or not takes_blocks(conv, self.data):
            for some in windows_of(tiles, count):
                x = convolve_windows(self._with_border(some), conv)
                yield x.permute(0, 2, 3, 1).flatten(0, 2), cells_of(some, height, width)
        elif count:
            wanted = _blocks_of(tiles)
            with self._computing():
                self._compute_blocks(_with_neighbours(wanted), self._blocks)
                self.computed = self.computed | tiles
            blocks = wanted.nonzero()
            pixels = self.data.new_empty(BLOCK * BLOCK * len(blocks), conv.weight.shape[0])
            convolve_blocks(self.data, conv, blocks, pixels)
            yield pixels, cells_of_blocks(blocks, height, width).flatten()

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with self.measured(), self._writing():
            yield

    def _writing(self) -> AbstractContextManager[Any]:
        # What was made in inference mode can be written in that mode only.
        return torch.inference_mode() if self.data.is_inference() else nullcontext()

    def _with_border(self, tiles: Tensor) -> Tensor:
        """Compute tiles with the cells around them, zeros beyond the map.

        Args:
            tiles: int64 ``[K, 3]``, image, row and column of each.

        Returns:
            ``[K, K', TILE + 2, TILE + 2]``, channels-last.
        """
        with self._computing():
            result = convolve_windows(self._cut(tiles, TILE + 4, border=2), self._conv)
            *_, is_outside = self._cells(tiles, TILE + 2, border=1)
            if _may_hold(is_outside):
                result = result.masked_fill(is_outside[:, None], 0)
            self._write(tiles, result[:, :, 1:-1, 1:-1])
            image, row, column = tiles.unbind(1)
            _, rows, columns = self.computed.shape
            self.computed.view(-1).index_fill_(0, (image * rows + row) * columns + column, True)
        return result

    def _compute_blocks(self, wanted: Tensor, done: Tensor) -> None:
        """Compute the blocks of ``wanted`` that are not ``done`` yet, bool ``[N, 2 P, 2 Q]``."""
        assert isinstance(self._conv, WinogradConv2d)
        missing = (wanted & ~done).nonzero()
        cells = cells_of_blocks(missing, *self.shape[2:])
        own = self._pixels()
        convolve_blocks(self._source, self._conv, missing, own, cells)
        done |= wanted
        if self._copies:
            self._write_copies(cells.flatten(), own[cells.flatten()])

    def _compute_whole(self, images: Sequence[bool]) -> None:
        if all(images):
            convolve_to(self._conv, self._source, self.data)
        else:
            for image, chosen in enumerate(images):
                if chosen:
                    part = slice(image, image + 1)
                    convolve_to(self._conv, self._source[part], self.data[part])
        pixels = self.data.permute(0, 2, 3, 1).flatten(1, 2)  # [N, H W, K]
        for table, first_rows in self._copies:
            for image, chosen in enumerate(images):
                if chosen:
                    first = int(first_rows[image])
                    table[first : first + pixels.shape[1]].copy_(pixels[image])

    def _cells(self, tiles: Tensor, side: int, border: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and columns ``[K, side]`` around tiles, and which cells are outside, for each."""
        height, width = self._source.shape[2:]
        _, row, column = tiles.unbind(1)
        cell = torch.arange(side, device=tiles.device) - border
        y, x = row[:, None] * TILE + cell, column[:, None] * TILE + cell
        outside_y, outside_x = (y < 0) | (y >= height), (x < 0) | (x >= width)
        return y, x, outside_y[:, :, None] | outside_x[:, None, :]

    def _cut(self, tiles: Tensor, side: int, border: int = 1) -> Tensor:
        """Windows of the source ``[K, C, side, side]``, ``border`` cells before the tiles."""
        _, channels, height, width = self._source.shape
        y, x, is_outside = self._cells(tiles, side, border)
        at_y = y.clamp(0, height - 1) + tiles[:, :1] * height
        rows = at_y[:, :, None] * width + x.clamp(0, width - 1)[:, None, :]  # [K, side, side]
        pixels = self._source.permute(0, 2, 3, 1).reshape(-1, channels)
        windows = pixels.index_select(0, rows.flatten()).view(*rows.shape, channels)
        if _may_hold(is_outside):
            windows = windows.masked_fill(is_outside[..., None], 0)
        return windows.permute(0, 3, 1, 2)

    def _write(self, tiles: Tensor, values: Tensor) -> None:
        """Write ``[K, K', TILE, TILE]`` to its place."""
        pixels = values.permute(0, 2, 3, 1).reshape(-1, values.shape[1])
        cells = cells_of(tiles, *self.shape[2:])
        self._pixels().index_copy_(0, cells, pixels.to(self.dtype))
        self._write_copies(cells, pixels)

    def _write_copies(self, cells: Tensor, pixels: Tensor) -> None:
        """Write pixels ``[R, K]`` of cells ``[R]`` of N maps to their rows in all copies."""
        _, _, height, width = self.shape
        for table, first_rows in self._copies:
            image = cells // (height * width)
            rows = cells % (height * width) + first_rows[image]
            table.index_copy_(0, rows, pixels.to(table.dtype))

    def _pixels(self) -> Tensor:
        """The data as ``[N H W, K]``, a view: they are channels-last."""
        return self.data.permute(0, 2, 3, 1).flatten(0, 2)


FeatureMap: TypeAlias = Tensor | TiledMap


def as_tensor(feature: FeatureMap) -> Tensor:
    """A map with all its tiles."""
    return feature.whole() if isinstance(feature, TiledMap) else feature


def whole_maps(maps: Mapping[str, FeatureMap]) -> dict[str, Tensor]:
    """Maps by name with all their tiles, for those who read tensors only."""
    return {name: as_tensor(x) for name, x in maps.items()}


def convolve_to(conv: nn.Module, x: Tensor, out: Tensor | None) -> Tensor:
    """``conv(x)``, written to ``out`` if given."""
    if out is not None and isinstance(conv, WinogradConv2d):
        return conv(x, out=out)
    output: Tensor = conv(x)
    return output if out is None else out.copy_(output)


def count_tiles(tiles: Tensor) -> list[int]:
    """How many are in each of N images of bool ``[N, P, Q]``; waits for a GPU."""
    counts: list[int] = tiles.flatten(1).sum(dim=1).tolist()
    return counts


def windows_of(tiles: Tensor, count: int) -> Iterator[Tensor]:
    """The indices ``[K, 3]`` of the tiles in bool ``[N, P, Q]``, some at a time.

    Their number is a multiple of 8, on GPUs always 64: the last tile is repeated.

    Args:
        tiles: to list.
        count: how many there are.
    """
    if count:
        listed = tiles.nonzero_static(size=count)
        # A GPU gets one shape, for which its libraries choose kernels once.
        step = _WINDOW_STEP if tiles.device.type == "cpu" else _MOST_WINDOWS
        filling = -count % step
        yield from torch.cat((listed, listed[-1:].expand(filling, -1))).split(_MOST_WINDOWS)


def cells_of(tiles: Tensor, height: int, width: int) -> Tensor:
    """Indices of the cells of tiles ``[K, 3]`` in the pixels of N maps: int64 ``[K TILE TILE]``."""
    image, row, column = tiles.unbind(1)
    cell = torch.arange(TILE, device=tiles.device)
    y = image[:, None] * height + row[:, None] * TILE + cell  # [K, TILE]
    x = column[:, None] * TILE + cell
    return (y[:, :, None] * width + x[:, None, :]).flatten()


def _blocks_of(tiles: Tensor) -> Tensor:
    """Tiles ``[N, P, Q]`` by block, ``[N, 2 P, 2 Q]``."""
    per_side = TILE // BLOCK
    return tiles.repeat_interleave(per_side, 1).repeat_interleave(per_side, 2)


def _with_neighbours(blocks: Tensor) -> Tensor:
    """Bool ``[N, H, W]`` with those beside them, corners too."""
    return F.max_pool2d(blocks.float(), 3, stride=1, padding=1) > 0


def _may_hold(mask: Tensor) -> bool:
    """Whether a mask holds anywhere, as far as is known without waiting for a GPU."""
    return mask.device.type != "cpu" or bool(mask.any())

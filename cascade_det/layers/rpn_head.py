"""The convolutional head of an RPN, and the selection of its best anchors.

Shapes: N images, L levels, C channels, A anchors at each position, M = H W A anchors of a level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.layers.conv_norm import convolved_relu
from cascade_det.layers.tile_gate import open_tiles, tile_scores
from cascade_det.layers.tiles import (
    TILE,
    FeatureMap,
    TiledMap,
    as_tensor,
    count_tiles,
)
from cascade_det.layers.windows import takes_windows

# Scores tiles ``[N, P, Q]`` by the hidden map ``[N, C, H, W]`` of the level after the finest.
TileScorer: TypeAlias = Callable[[Tensor], Tensor]
# Positions whose features are converted to float32 at a time.
_POSITIONS = 16384


class BestAnchors(NamedTuple):
    """The best K anchors of one level, best objectness first.

    Attributes:
        logits: float32 ``[N, K]``, objectness.
        anchor_index: int64 ``[N, K]``, among the M anchors of the level.
        deltas: ``[N, K, 4]``.
    """

    logits: Tensor
    anchor_index: Tensor
    deltas: Tensor


def best_anchors(logits: Tensor, deltas: Tensor, most: int) -> BestAnchors:
    """The ``most`` best anchors of one level, or all if there are fewer.

    Args:
        logits: ``[N, M]``.
        deltas: ``[N, M, 4]``.
        most: upper bound of K.
    """
    top, index = logits.float().topk(min(most, logits.shape[1]), dim=1)
    return BestAnchors(top, index, deltas.gather(1, index[..., None].expand(-1, -1, 4)))


class TileCandidates(NamedTuple):
    """The best anchors at one tile threshold.

    Attributes:
        best: of the L levels.
        opened: bool ``[N, P, Q]``, the tiles of the finest map that are read.
    """

    best: list[BestAnchors]
    opened: Tensor


class RPNHead(nn.Module):
    """3x3 convolution(s) shared by the levels, then objectness and deltas of each anchor.

    Args:
        in_channels: C of the levels.
        num_anchors: A.
        conv_dims: output channels of the convolutions; -1 keeps the number.

    Attributes:
        topk_deltas_only: whether ``best`` computes the deltas of the best anchors only, with both
            last layers in float32. For inference; rounding differs from that of whole maps.
    """

    def __init__(
        self, *, in_channels: int, num_anchors: int, conv_dims: Sequence[int] = (-1,)
    ) -> None:
        super().__init__()
        convs: list[nn.Conv2d] = []
        channels = in_channels
        for width in conv_dims:
            out_channels = channels if width == -1 else width
            convs.append(nn.Conv2d(channels, out_channels, 3, padding=1))
            channels = out_channels
        if len(convs) == 1:
            self.conv: nn.Module = convs[0]
        else:
            self.conv = nn.Sequential()
            for i, conv in enumerate(convs):
                self.conv.add_module(f"conv{i}", conv)
        self.objectness_logits = nn.Conv2d(channels, num_anchors, 1)
        self.anchor_deltas = nn.Conv2d(channels, num_anchors * 4, 1)
        self.topk_deltas_only = False
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)

    @property
    def convs(self) -> tuple[nn.Module, ...]:
        """The 3x3 convolutions, in order."""
        return tuple(self.conv) if isinstance(self.conv, nn.Sequential) else (self.conv,)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """L maps ``[N, C, H_l, W_l]`` to logits ``[N, M_l]`` and deltas ``[N, M_l, 4]``."""
        logits, deltas = [], []
        for x in features:
            own_logits, own_deltas = self._of_whole_map(self.hidden(x))
            logits.append(own_logits)
            deltas.append(own_deltas)
        return logits, deltas

    def _of_whole_map(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[N, M]`` and deltas ``[N, M, 4]`` of all anchors, from a hidden map."""
        # [N, A, H, W] -> [N, H W A]
        logits = self.objectness_logits(hidden).permute(0, 2, 3, 1).flatten(1)
        # [N, A 4, H, W] -> [N, A, 4, H, W] -> [N, H, W, A, 4] -> [N, H W A, 4]
        deltas = self.anchor_deltas(hidden).unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2)
        return logits, deltas.flatten(1, 3)

    def best(
        self,
        features: Sequence[FeatureMap],
        most: int,
        *,
        tile_threshold: float = 0.0,
        tile_scorer: TileScorer | None = None,
    ) -> list[BestAnchors]:
        """The ``most`` best anchors of each of L maps ``[N, C, H_l, W_l]``, finest first.

        Args:
            features: the first may be a ``TiledMap``, the others are tensors.
            most: upper bound of K.
            tile_threshold: of a ``TiledMap`` only the tiles are read that ``open_tiles`` opens;
                slots for which there are no anchors have a logit of minus infinity. A head that
                does not take tiles, or has one map alone, reads all.
            tile_scorer: scores tiles for that; ``None`` by objectness.
        """
        finest = features[0]
        in_tiles = isinstance(finest, TiledMap) and tile_threshold > 0
        if not in_tiles or not self.takes_tiles or len(features) < 2:
            return self._best_of_maps([as_tensor(x) for x in features], most)
        assert isinstance(finest, TiledMap)
        coarser = [self.hidden(as_tensor(x)) for x in features[1:]]
        finest.opened = open_tiles(self._tile_scores(coarser[0], tile_scorer), tile_threshold)
        best = [self._best_with_deltas(x, most) for x in coarser]
        return [self._best_in_tiles(finest, most), *best]

    @property
    def takes_tiles(self) -> bool:
        """Whether ``best`` can read a ``TiledMap``."""
        return len(self.convs) == 1 and takes_windows(self.convs[0])

    def best_at(
        self,
        features: Sequence[Tensor],
        most: int,
        thresholds: Sequence[float],
        *,
        tile_scorer: TileScorer | None = None,
    ) -> list[TileCandidates]:
        """What ``best`` finds at each of some tile thresholds, from whole maps.

        The logits and deltas of an anchor are the same numbers at every threshold; from those of
        ``best`` they differ by rounding.

        Args:
            features: L maps ``[N, C, H_l, W_l]``, finest first.
            most: upper bound of K.
            thresholds: see ``best``.
            tile_scorer: see ``best``.
        """
        hidden = [self.hidden(x) for x in features]
        maps = [self._anchors(x) for x in hidden]
        images, _, height, width = features[0].shape
        shape = images, height // TILE, width // TILE
        logits, deltas = maps[0]
        scores = self._tile_scores(hidden[1], tile_scorer)
        coarser = [best_anchors(*own, most) for own in maps[1:]]
        found = []
        for threshold in thresholds:
            opened = torch.ones(shape, dtype=torch.bool, device=logits.device)
            if threshold > 0:
                opened = open_tiles(scores, threshold)
            cells = opened.repeat_interleave(TILE, dim=1).repeat_interleave(TILE, dim=2)
            is_open = cells.flatten(1).repeat_interleave(logits.shape[1] // (height * width), dim=1)
            in_image = int(is_open.sum(dim=1).max())
            read = logits.masked_fill(~is_open, -torch.inf)
            finest = best_anchors(read, deltas, min(most, in_image))
            found.append(TileCandidates([finest, *coarser], opened))
        return found

    def _anchors(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """As ``_of_whole_map``, in the types of ``best``: logits are float32."""
        if not self.topk_deltas_only:
            logits, deltas = self._of_whole_map(hidden)
            return logits.float(), deltas
        pixels = hidden.permute(0, 2, 3, 1).flatten(1, 2)
        outputs = [
            torch.cat([_per_pixel(layer, p) for p in pixels.split(_POSITIONS, dim=1)], dim=1)
            for layer in (self.objectness_logits, self.anchor_deltas)
        ]
        return outputs[0].flatten(1).float(), outputs[1].unflatten(2, (-1, 4)).flatten(1, 2)

    def _best_of_maps(self, features: Sequence[Tensor], most: int) -> list[BestAnchors]:
        if self.topk_deltas_only:
            return [self._best_with_deltas(self.hidden(x), most) for x in features]
        logits, deltas = self(features)
        return [best_anchors(x, d, most) for x, d in zip(logits, deltas, strict=True)]

    def _tile_scores(self, hidden: Tensor, scorer: TileScorer | None) -> Tensor:
        """``[N, P, Q]``, from the hidden map of the level after the finest."""
        if scorer is not None:
            return scorer(hidden)
        logits = _per_pixel(self.objectness_logits, hidden.permute(0, 2, 3, 1))
        return tile_scores(logits.float().amax(dim=3))  # of the best anchor of each cell

    def _best_in_tiles(self, finest: TiledMap, most: int) -> BestAnchors:
        """The best anchors in the open tiles."""
        counts = count_tiles(finest.opened)
        whole = [count == finest.opened[0].numel() for count in counts]
        if all(whole):
            return self._best_of_maps([finest.whole()], most)[0]
        if not any(whole):
            return self._best_of_tiles(finest, finest.opened, counts, most)
        as_a_whole = finest.opened.flatten(1).all(dim=1)
        finest.compute(finest.opened & as_a_whole[:, None, None])
        rows = as_a_whole.nonzero_static(size=sum(whole)).squeeze(1)
        of_maps = self._best_of_maps([finest.data[rows]], most)[0]
        others = [0 if own else count for count, own in zip(counts, whole, strict=True)]
        in_tiles = finest.opened & ~as_a_whole[:, None, None]
        return _with_rows(self._best_of_tiles(finest, in_tiles, others, most), rows, of_maps)

    def _best_of_tiles(
        self, finest: TiledMap, tiles_to_read: Tensor, counts: Sequence[int], most: int
    ) -> BestAnchors:
        """The best anchors in some tiles, of which each image has as many as ``counts`` says."""
        anchors = self.objectness_logits.out_channels
        images, _, height, width = finest.shape
        rows, logits, hidden = [], [], []
        for pixels, cells in finest.convolve(self.convs[0], tiles_to_read, sum(counts)):
            hidden.append(F.relu_(pixels))  # [R, C]
            logits.append(_per_pixel(self.objectness_logits, pixels).float())
            rows.append(cells)
        device = finest.device
        dense = torch.full((images * height * width, anchors), -torch.inf, device=device)
        place = torch.zeros(images * height * width, dtype=torch.int64, device=device)
        if rows:
            at = torch.cat(rows)
            dense[at] = torch.cat(logits)
            place[at] = torch.arange(len(at), device=device)
        in_image = max(counts) * TILE * TILE * anchors
        top, index = dense.view(images, -1).topk(min(most, in_image), dim=1)  # [N, K]
        cell = index // anchors + torch.arange(images, device=device)[:, None] * (height * width)
        if not rows:
            return BestAnchors(top, index, top.new_zeros(*top.shape, 4))
        deltas = _per_pixel(self.anchor_deltas, torch.cat(hidden)[place[cell]])
        return BestAnchors(top, index, _of_anchor(deltas, index % anchors))

    def hidden(self, x: Tensor) -> Tensor:
        """A map ``[N, C, H, W]`` after the convolutions, ``[N, C', H, W]``."""
        for conv in self.convs:
            x = convolved_relu(x, conv)
        return x

    def _best_with_deltas(self, hidden: Tensor, most: int) -> BestAnchors:
        num_anchors = self.objectness_logits.out_channels
        # [N, H W, C], without a copy if the map is channels-last
        pixels = hidden.permute(0, 2, 3, 1).flatten(1, 2)
        # Compiled, the number of pieces would tie the code to few sizes.
        most_at_once = pixels.shape[1] if torch.compiler.is_compiling() else _POSITIONS
        parts = [_per_pixel(self.objectness_logits, p) for p in pixels.split(most_at_once, dim=1)]
        logits = torch.cat(parts, dim=1).flatten(1)
        top, index = logits.topk(min(most, logits.shape[1]), dim=1)  # [N, K]
        images = torch.arange(len(pixels), device=pixels.device)[:, None]
        deltas = _per_pixel(self.anchor_deltas, pixels[images, index // num_anchors])
        return BestAnchors(top, index, _of_anchor(deltas, index % num_anchors))


def _per_pixel(conv: nn.Conv2d, pixels: Tensor) -> Tensor:
    """A 1x1 convolution of pixels ``[N, P, C]``, in the type of its weights."""
    return F.linear(pixels.to(conv.weight.dtype), conv.weight.flatten(1), conv.bias)


def _of_anchor(deltas: Tensor, anchor: Tensor) -> Tensor:
    """Deltas ``[N, K, 4]`` of one anchor each, of ``[N, K, A 4]``."""
    at = anchor[..., None, None].expand(-1, -1, 1, 4)  # [N, K, 1, 4]
    return deltas.unflatten(2, (-1, 4)).gather(2, at).squeeze(2)


def _with_rows(best: BestAnchors, rows: Tensor, own: BestAnchors) -> BestAnchors:
    """``best`` of N images with those of some ``rows`` in place, which have as many or more."""
    missing = own.logits.shape[1] - best.logits.shape[1]
    padded = (
        F.pad(best.logits, (0, missing), value=-torch.inf),
        F.pad(best.anchor_index, (0, missing)),
        F.pad(best.deltas, (0, 0, 0, missing)),
    )
    return BestAnchors(*(x.index_copy(0, rows, y) for x, y in zip(padded, own, strict=True)))

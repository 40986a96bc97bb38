"""What tile gates would have proposed and computed, beside a record of the full cascade.

A tile threshold changes the proposals: those of all thresholds are recorded together, and each
knows which thresholds it belongs to. N images, R regions of all of them, T thresholds, P x Q tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cascade_det.core.roi_pooling import RoIPooler
from cascade_det.layers.tiles import WHOLE_FROM

# How tiles are computed: with the whole map, as without a gate; with the RPN over them, where the
# gate opens them; for regions; and for regions, with all tiles of an image at once.
TILE_WORK = ("dense", "open", "later", "whole")


@dataclass
class TileProposals:
    """The tile gates of some thresholds.

    Attributes:
        thresholds: T, of which the first is 0, the whole map.
        members: bool ``[R, T]``, which regions are proposed at each threshold.
        opened: N of bool ``[T, P_i, Q_i]``, the tiles that the RPN reads.
    """

    thresholds: tuple[float, ...]
    members: Tensor
    opened: list[Tensor]

    def cpu(self) -> TileProposals:
        """A copy on the CPU."""
        opened = [tiles.cpu() for tiles in self.opened]
        return replace(self, members=self.members.cpu(), opened=opened)

    def select(self, rows: Tensor, images: Sequence[int]) -> TileProposals:
        """Of some of the regions and images."""
        opened = [self.opened[image] for image in images]
        return replace(self, members=self.members[rows], opened=opened)

    def index(self, threshold: float) -> int:
        """The place of a threshold.

        Raises:
            ValueError: it was not recorded.
        """
        if threshold not in self.thresholds:
            recorded = ", ".join(f"{value:g}" for value in self.thresholds)
            raise ValueError(
                f"the tile threshold {threshold:g} was not recorded: give one of {recorded}, or "
                "record with it"
            )
        return self.thresholds.index(threshold)


def join_tiles(parts: Sequence[TileProposals | None]) -> TileProposals | None:
    """Of all images, in order; ``None`` if one of them lacks it.

    Raises:
        ValueError: their thresholds differ.
    """
    own = [part for part in parts if part is not None]
    if len(own) < len(parts):
        return None
    if len({part.thresholds for part in own}) > 1:
        raise ValueError("records of different tile thresholds cannot be joined")
    members = torch.cat([part.members for part in own])
    return TileProposals(
        own[0].thresholds, members, [tiles for part in own for tiles in part.opened]
    )


def join_proposals(
    proposals: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]],
    thresholds: Sequence[float],
    opened: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor], TileProposals]:
    """The proposals of T tile thresholds together, each once.

    Two are the same if their numbers are.

    Args:
        proposals: at each threshold, for each of N images, boxes float32 ``[R_ti, 4]``; and in the
            same way logits float32 ``[R_ti]``, best first.
        thresholds: T.
        opened: T of bool ``[N, P, Q]``, the tiles that the RPN reads.

    Returns:
        Boxes ``[R_i, 4]`` and logits ``[R_i]`` of each image, best first, and which belong to each
        threshold. Ties are in the order of the first threshold.
    """
    joined = [
        _join_image([boxes[image] for boxes, _ in proposals], [x[image] for _, x in proposals])
        for image in range(len(opened[0]))
    ]
    members = torch.cat([members for _, _, members in joined])
    tiles = TileProposals(tuple(thresholds), members, [*torch.stack([*opened], dim=1)])
    return [boxes for boxes, _, _ in joined], [logits for _, logits, _ in joined], tiles


def _join_image(boxes: Sequence[Tensor], logits: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    counts = torch.tensor([len(x) for x in logits], device=logits[0].device)
    source = torch.arange(len(logits), device=counts.device).repeat_interleave(counts)  # [K]
    rows = torch.cat([torch.cat(list(logits))[:, None], torch.cat(list(boxes))], dim=1)  # [K, 5]
    _, same = torch.unique(rows, dim=0, return_inverse=True)
    # A threshold can have equal proposals, of different anchors: the n-th ones belong together.
    repeats = _places(same * len(logits) + source)
    _, identity = torch.unique(torch.stack([same, repeats], dim=1), dim=0, return_inverse=True)
    order = torch.argsort(identity, stable=True)
    firsts = order[torch.searchsorted(identity[order], identity.unique())].sort().values  # [R]
    firsts = firsts[torch.argsort(rows[firsts, 0], descending=True, stable=True)]
    place = torch.empty_like(firsts)
    place[identity[firsts]] = torch.arange(len(firsts), device=firsts.device)
    members = torch.zeros(len(firsts), len(logits), dtype=torch.bool, device=firsts.device)
    members[place[identity], source] = True
    return rows[firsts, 1:], rows[firsts, 0], members


def _places(groups: Tensor) -> Tensor:
    """How many equal numbers are before each, ``[K]``."""
    order = torch.argsort(groups, stable=True)
    ordered = groups[order]
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return places - torch.searchsorted(ordered, groups)


class TileUse:
    """Counts the tiles that a detector with a tile gate computes, as ``TiledMap`` does.

    Args:
        opened: N of bool ``[P_i, Q_i]``, the tiles that the RPN reads.
        pooler: pools the regions.
        pools_whole_maps: whether it needs all tiles, whatever the regions.

    Attributes:
        work: int64 ``[4, N]``, tiles by ``TILE_WORK``.
    """

    def __init__(
        self, opened: Sequence[Tensor], pooler: RoIPooler, *, pools_whole_maps: bool = False
    ) -> None:
        self._pooler = pooler
        self.work = torch.zeros(len(TILE_WORK), len(opened), dtype=torch.int64)
        by_shape: dict[torch.Size, list[int]] = {}
        for image, tiles in enumerate(opened):
            by_shape.setdefault(tiles.shape, []).append(image)
            dense = bool(tiles.all())
            self.work[0 if dense else 1, image] = int(tiles.sum())
        self._images = [torch.tensor(images) for images in by_shape.values()]
        self._computed = [
            torch.stack([opened[image] for image in images]) for images in by_shape.values()
        ]
        self._group = torch.zeros(len(opened), dtype=torch.int64)
        self._slot = torch.zeros(len(opened), dtype=torch.int64)
        for group, images in enumerate(self._images):
            self._group[images] = group
            self._slot[images] = torch.arange(len(images))
        if pools_whole_maps:
            for group, tiles in enumerate(self._computed):
                self._compute(group, torch.ones_like(tiles))

    def read(self, boxes: Tensor, image_index: Tensor) -> None:
        """Compute what the pooling of some regions reads.

        Args:
            boxes: float32 ``[R, 4]``, in pixels of the resized images.
            image_index: int64 ``[R]``.
        """
        for group, computed in enumerate(self._computed):
            if computed.all():
                continue
            own = self._group[image_index] == group
            slots = self._slot[image_index[own]]
            self._compute(group, self._pooler.tiles_read(boxes[own], slots, computed.shape))

    def _compute(self, group: int, wanted: Tensor) -> None:
        images, computed = self._images[group], self._computed[group]
        missing = wanted & ~computed
        counts, of_image = missing.flatten(1).sum(dim=1), computed[0].numel()
        as_a_whole = counts >= WHOLE_FROM * of_image
        self.work[2, images] += counts.masked_fill(as_a_whole, 0)
        self.work[3, images] += as_a_whole * of_image
        self._computed[group] = computed | wanted | as_a_whole[:, None, None]

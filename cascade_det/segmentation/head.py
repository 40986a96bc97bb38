"""The head of a segmenter: a CASCADE decoder with a prediction from every level."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from cascade_det.backbones.cascade_decoder import CascadeDecoder
from cascade_det.core.structures import PartTimer, part
from cascade_det.segmentation.map_exits import MapExits


class SegmentationHead(nn.Module):
    """Decodes maps from coarse to fine, and predicts the classes of pixels after each level.

    The prediction is the sum of all logits ("Medical Image Segmentation via Cascaded Attention
    Decoding", WACV 2023, section 3.2).

    Args:
        channels: of the maps, coarsest first.
        num_classes: K, background included.
        fuse: see ``CascadeDecoder``.
        finest_gate: see ``CascadeDecoder``.
        exits: settings of ``MapExits``; ``None`` for no exits.

    Raises:
        ValueError: see ``CascadeDecoder`` and ``MapExits``.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        *,
        fuse: str = "add",
        finest_gate: int | None = None,
        exits: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.decoder = CascadeDecoder(channels, fuse=fuse, finest_gate=finest_gate)
        self.heads = nn.ModuleList(nn.Conv2d(width, num_classes, 1) for width in channels)
        self.exits: MapExits | None = None
        self.set_exits(exits)

    def set_exits(self, exits: Mapping[str, Any] | None) -> None:
        """Replace the exits: settings of ``MapExits``, or ``None`` for none."""
        self.exits = None if exits is None else MapExits(self.decoder, self.heads, **exits)

    def forward(
        self, maps: Sequence[Tensor], timer: PartTimer | None = None, *, prefix: str = ""
    ) -> list[Tensor]:
        """The same as ``decode``, which heads of another ``forward`` have as well."""
        return self.decode(maps, timer, prefix=prefix)

    def decode(
        self,
        maps: Sequence[Tensor],
        timer: PartTimer | None = None,
        *,
        prefix: str = "",
        last: int | None = None,
    ) -> list[Tensor]:
        """Logits of every level, or of the levels up to ``last``.

        Args:
            maps: ``[N, C_l, H_l, W_l]``, coarsest first.
            timer: measures the milliseconds of every level, ``stage0`` and so on.
            prefix: of these names.
            last: level after which to stop; ``None`` for the finest.

        Returns:
            ``[N, K, H_l, W_l]``, coarsest first.
        """
        logits, _ = decode(self.decoder, self.heads, maps, timer, prefix=prefix, last=last)
        return logits


def decode(
    decoder: CascadeDecoder,
    heads: Iterable[nn.Module],
    maps: Sequence[Tensor],
    timer: PartTimer | None = None,
    *,
    prefix: str = "",
    last: int | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Decode maps, and predict after each level.

    Args:
        decoder: of the maps.
        heads: of its levels, coarsest first.
        maps: ``[N, C_l, H_l, W_l]``, coarsest first.
        timer: adds the milliseconds of every level to ``stage0`` and so on.
        prefix: of these names.
        last: level after which to stop; ``None`` for the finest.

    Returns:
        Logits ``[N, K, H_l, W_l]`` of every level, and the last decoded map, of the shape of its
        level's in ``maps``.
    """
    logits: list[Tensor] = []
    decoded = maps[0]
    for stage, (head, encoded) in enumerate(zip(heads, maps, strict=True)):
        with part(timer, f"{prefix}stage{stage}"):
            if stage == 0:
                decoded = decoder.start(encoded)
            else:
                decoded = decoder.refine(len(maps) - stage, decoded, encoded)
            logits.append(head(decoded))
        if stage == last:
            break
    return logits, decoded

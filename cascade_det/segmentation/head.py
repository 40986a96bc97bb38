"""The head of a segmenter: a CASCADE decoder with a prediction from every level."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.backbones.cascade_decoder import CascadeDecoder
from cascade_det.core.structures import PartTimer, part


class SegmentationHead(nn.Module):
    """Decodes maps from coarse to fine, and predicts the classes of pixels after each level.

    The prediction is the sum of all logits ("Medical Image Segmentation via Cascaded Attention
    Decoding", WACV 2023, section 3.2).

    Args:
        channels: of the maps, coarsest first.
        num_classes: K, background included.
        fuse: see ``CascadeDecoder``.
        finest_gate: see ``CascadeDecoder``.

    Raises:
        ValueError: see ``CascadeDecoder``.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        *,
        fuse: str = "add",
        finest_gate: int | None = None,
    ) -> None:
        super().__init__()
        self.decoder = CascadeDecoder(channels, fuse=fuse, finest_gate=finest_gate)
        self.heads = nn.ModuleList(nn.Conv2d(width, num_classes, 1) for width in channels)

    def forward(self, maps: Sequence[Tensor], timer: PartTimer | None = None) -> list[Tensor]:
        """Logits of every level.

        Args:
            maps: ``[N, C_l, H_l, W_l]``, coarsest first.
            timer: measures the milliseconds of every level, ``stage0`` and so on.

        Returns:
            ``[N, K, H_l, W_l]``, coarsest first.
        """
        logits: list[Tensor] = []
        decoded = maps[0]
        for stage, (head, encoded) in enumerate(zip(self.heads, maps, strict=True)):
            with part(timer, f"stage{stage}"):
                if stage == 0:
                    decoded = self.decoder.start(encoded)
                else:
                    decoded = self.decoder.refine(len(maps) - stage, decoded, encoded)
                logits.append(head(decoded))
        return logits


def resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """``[N, K, H_l, W_l]`` to ``[N, K, *size]``, bilinearly, corners not aligned."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def predict(logits: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """The sum of the logits of all levels ``[N, K, H_l, W_l]``, each resized to ``size``."""
    total = resize(logits[0], size)
    for finer in logits[1:]:
        total = total + resize(finer, size)
    return total

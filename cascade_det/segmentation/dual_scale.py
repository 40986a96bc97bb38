"""MERIT: a segmentation network that sees an image at two scales."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.backbones.cascade_decoder import CascadeDecoder
from cascade_det.backbones.trunk import Trunk
from cascade_det.core.structures import PartTimer, part
from cascade_det.segmentation.head import decode

MODES = ("parallel", "cascaded")


class DualScaleNetwork(nn.Module):
    """Two encoders, each with its own size of the image, and a decoder with heads for both.

    "Multi-scale Hierarchical Vision Transformer with Cascaded Attention Decoding for Medical Image
    Segmentation" (arXiv 2303.16892), section 3. Logits of both scales are added, level by level.
    By ``cascaded``, the second encoder sees the image through a mask that the first pass predicts,
    and the first encoder's maps are added to its own. State-dict names are the official ones:
    ``out_head1`` is the head of the coarsest level, and ``conv``, the stem of grey images, always
    exists.

    Norms of the decoder see two batches per step in training, one per scale.

    Args:
        backbones: encoders of equal channels, for the first and the second size.
        decoder: of these channels.
        num_classes: K, background included.
        sizes: sides of the squares to which images are resized, in pixels.
        mode: ``parallel`` or ``cascaded``.

    Raises:
        ValueError: for an unknown mode, or channels of an encoder that the decoder does not take.
    """

    def __init__(
        self,
        *,
        backbones: tuple[Trunk, Trunk],
        decoder: CascadeDecoder,
        num_classes: int,
        sizes: tuple[int, int] = (256, 224),
        mode: str = "cascaded",
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
        for i, backbone in enumerate(backbones, start=1):
            channels = tuple(backbone.channels[name] for name in reversed(backbone.out_features))
            if channels != decoder.channels:
                raise ValueError(
                    f"encoder {i} has {channels} channels, coarsest first, and the decoder takes "
                    f"{decoder.channels}"
                )
        self.sizes, self.mode = sizes, mode
        self.conv = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True))
        self.backbone1, self.backbone2 = backbones
        self.decoder = decoder
        for i, width in enumerate(decoder.channels, start=1):
            self.add_module(f"out_head{i}", nn.Conv2d(width, num_classes, 1))
        if mode == "cascaded":
            self._mask_head = f"out_head{len(decoder.channels)}_in"
            self.add_module(self._mask_head, nn.Conv2d(decoder.channels[-1], 1, 1))

    def forward(self, images: Tensor, timer: PartTimer | None = None) -> list[Tensor]:
        """Logits of every level, whose sum is the prediction.

        Args:
            images: ``[N, 1 or 3, H, W]`` of any size.
            timer: measures the milliseconds of ``backbone``, both encoders, and of the levels,
                ``stage0`` and so on, over both scales.

        Returns:
            ``[N, K, side, side]``, coarsest first, for the caller to resize to the images; ``side``
            is the first size.
        """
        first, second = ((side, side) for side in self.sizes)
        if self.mode == "cascaded":
            images = _resized(images, first)
        if images.shape[1] == 1:
            images = self.conv(images)

        numbers = range(1, 1 + len(self.decoder.channels))
        heads = [self.get_submodule(f"out_head{i}") for i in numbers]
        with part(timer, "backbone"):
            maps = _coarsest_first(self.backbone1(_resized(images, first)))
        logits, finest = decode(self.decoder, heads, maps, timer)
        with part(timer, "backbone"):
            if self.mode == "cascaded":
                mask = self.get_submodule(self._mask_head)(finest).sigmoid()
                images = images * _resized(mask, first)
            others = _coarsest_first(self.backbone2(_resized(images, second)))
            if self.mode == "cascaded":
                pairs = zip(others, maps, strict=True)
                others = [x + _resized(fed_back, x.shape[-2:]) for x, fed_back in pairs]
        other_logits, _ = decode(self.decoder, heads, others, timer)
        with part(timer, "postprocess"):
            return [
                _resized(x, first) + _resized(other, first)
                for x, other in zip(logits, other_logits, strict=True)
            ]


def _coarsest_first(maps: dict[str, Tensor]) -> list[Tensor]:
    return list(maps.values())[::-1]


def _resized(x: Tensor, size: tuple[int, ...]) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False)

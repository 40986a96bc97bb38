"""Early exits of a segmenter: images and patches that finer levels need not decode.

Shapes: N images, K classes, L levels, ``[H_l, W_l]`` of level l; levels count from 0, the coarsest.
A patch is a square of the finest level's pixels, one of ``[G, B]``; at the border it may be cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.backbones.cascade_decoder import CascadeDecoder
from cascade_det.core.structures import PartTimer, part
from cascade_det.layers.weight_versions import weight_versions
from cascade_det.segmentation.logits import predict, resize
from cascade_det.segmentation.map_confidence import image_confidence, patch_confidence
from cascade_det.segmentation.pixel_rows import PixelRows, dilate
from cascade_det.segmentation.sparse_decoder import ATTENDED, UPSAMPLED, SparseLevel

KINDS = ("image", "patch")
CHANNEL_GATES = ("computed", "dense")
# Of a level's pixels. With more of them a whole level takes less time, measured on AVX-512 with
# FastUpConv.
DENSE_SHARE = 0.75


class ExitedMaps(NamedTuple):
    """The answer of a decoder with exits.

    Attributes:
        logits: ``[N, K, H, W]`` in the size of the finest level: where the decoder was left
            after level l, the sum of the logits of levels 0 to l.
        levels: int64, l of each image ``[N]`` or patch ``[N, G, B]``; L - 1 without an exit.
    """

    logits: Tensor
    levels: Tensor


class MapExits:
    """Runs a decoder and applies exits after each level, for inference in evaluation mode.

    What is sure of its prediction so far leaves, as with classifiers of whole images (BranchyNet,
    arXiv 1709.01686) and with pixels (ADP-C, arXiv 2104.00749). The prediction is the softmax of
    the summed logits, in the size of the level just decoded.

    Of *images*, those that stay are compacted into a smaller batch. Of *patches*, finer levels
    compute those that stay and the surroundings that their convolutions reach, also those that
    even finer levels would reach. So the logits of a patch are those of the whole decoder cut off
    where the patch left, whatever its neighbours did; only channel attention, which pools over
    the whole map, is approximated (see ``SparseLevel``). A level of which most pixels would be
    computed runs as a whole, if those before it did.

    Args:
        decoder: in evaluation mode. Patches use a copy of its weights, renewed when they were
            loaded or replaced, or a training pass changed the statistics of its norms.
        heads: a 1x1 convolution per level, coarsest first.
        thresholds: L - 1 of them, coarsest first: what has this confidence or more leaves after
            the level; above 1, nothing does. May be replaced between calls.
        kind: what leaves, ``image`` or ``patch``.
        confidence: see ``map_confidence.pixel_confidence``.
        patch: side of a patch in pixels of the finest level. Smaller ones follow outlines more
            closely, and save more, down to 4 (measured).
        channel_gates: of patches: see ``SparseLevel``.

    Raises:
        ValueError: an unknown ``kind`` or ``channel_gates``.
    """

    def __init__(
        self,
        decoder: CascadeDecoder,
        heads: nn.ModuleList,
        *,
        thresholds: Sequence[float],
        kind: str = "image",
        confidence: str = "max",
        patch: int = 8,
        channel_gates: str = "computed",
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"unknown kind of exits {kind!r}; known: {', '.join(KINDS)}")
        if channel_gates not in CHANNEL_GATES:
            known = ", ".join(CHANNEL_GATES)
            raise ValueError(f"unknown channel gates {channel_gates!r}; known: {known}")
        self.decoder = decoder
        self.heads = heads
        self.thresholds = thresholds
        self.kind = kind
        self.confidence = confidence
        self.patch = patch
        self.channel_gates = channel_gates
        self._sparse: list[SparseLevel] = []
        self._versions: list[tuple[int, int, int]] = []

    @torch.no_grad()
    def __call__(self, maps: Sequence[Tensor], timer: PartTimer | None = None) -> ExitedMaps:
        """Decode maps of an encoder, ``[N, C_l, H_l, W_l]``, coarsest first.

        Args:
            maps: of the encoder.
            timer: measures the milliseconds of every level with its exits, ``stage0`` and so on.

        Raises:
            ValueError: not L - 1 thresholds, an unknown confidence, or one class.
        """
        if len(self.thresholds) != len(maps) - 1:
            raise ValueError(
                f"{len(maps)} levels need {len(maps) - 1} thresholds: {list(self.thresholds)}"
            )
        if self.kind == "image":
            return self._by_image(list(maps), timer)
        return self._by_patch(maps, timer)

    def sparse_levels(self) -> list[SparseLevel]:
        """Of all levels but the coarsest, coarser first, with the current weights."""
        versions = weight_versions([self.decoder])
        if versions != self._versions:
            levels = range(len(self.heads) - 1, 0, -1)  # in the decoder 1 is the finest
            self._sparse = [
                SparseLevel(self.decoder, level, dense_gates=self.channel_gates == "dense")
                for level in levels
            ]
            self._versions = versions
        return self._sparse

    def _by_image(self, maps: list[Tensor], timer: PartTimer | None) -> ExitedMaps:
        images, last, size = len(maps[0]), len(maps) - 1, _size(maps[-1])
        staying = torch.arange(images, device=maps[0].device)
        levels = torch.full_like(staying, last)
        logits: list[Tensor] = []
        output = decoded = maps[0].new_empty(0)
        for level in range(last + 1):
            with part(timer, f"stage{level}"):
                decoded = self._decode(level, decoded, maps[level])
                logits.append(self.heads[level](decoded))
                if level == last:
                    leave = torch.ones_like(staying, dtype=torch.bool)
                else:
                    so_far = predict(logits, _size(maps[level]))
                    # A comparison with NaN is false: what is not a number stays.
                    leave = image_confidence(so_far, self.confidence) >= self.thresholds[level]
                left = leave.nonzero()[:, 0]
                if len(left):
                    done = predict([x[left] for x in logits], size)
                    if not len(output):
                        output = done.new_empty(images, *done.shape[1:])
                    output[staying[left]] = done
                    levels[staying[left]] = level
                    rest = (~leave).nonzero()[:, 0]
                    staying, decoded, logits = (
                        staying[rest],
                        decoded[rest],
                        [x[rest] for x in logits],
                    )
                    maps = [x[rest] if finer > level else x for finer, x in enumerate(maps)]
            if not len(staying):
                break
        return ExitedMaps(output, levels)

    def _by_patch(self, maps: Sequence[Tensor], timer: PartTimer | None) -> ExitedMaps:
        last, size = len(maps) - 1, _size(maps[-1])
        grid = [ceil(side / self.patch) for side in size]
        levels = torch.full((len(maps[0]), *grid), last, device=maps[0].device)
        halos = level_halos([_size(x) for x in maps])
        logits: list[Tensor] = []
        decoded: Tensor | PixelRows = maps[0].new_empty(0)
        for level, encoded in enumerate(maps):
            active = levels == last
            if not active.any():
                break
            with part(timer, f"stage{level}"):
                wanted = patch_pixels(active, self.patch, size, _size(encoded))
                wanted = dilate(wanted, halos[level])
                if isinstance(decoded, Tensor) and computed_share(wanted) > DENSE_SHARE:
                    decoded = self._decode(level, decoded, encoded)
                    logits.append(self.heads[level](decoded))
                else:
                    if isinstance(decoded, Tensor):
                        decoded = PixelRows.of_map(decoded)
                    decoded = self.sparse_levels()[level - 1](decoded, encoded, wanted)
                    logits.append(_classify(self.heads[level], decoded))
                if level < last:
                    levels[active & self._leaves(level, predict(logits, _size(encoded)), size)] = (
                        level
                    )
        with part(timer, f"stage{len(logits) - 1}"):
            return ExitedMaps(self._assemble(logits, levels, size), levels)

    def _leaves(self, level: int, so_far: Tensor, size: tuple[int, int]) -> Tensor:
        """Whether each patch, bool ``[N, G, B]``, is sure of the prediction so far."""
        confidence = patch_confidence(so_far, self.confidence, size=size, patch=self.patch)
        # A comparison with NaN is false: what is not a number stays.
        return confidence >= self.thresholds[level]

    def _assemble(self, logits: list[Tensor], levels: Tensor, size: tuple[int, int]) -> Tensor:
        """The sum over the levels that each patch reached, added in the order of ``predict``."""
        output = resize(logits[0], size)
        for level, finer in enumerate(logits[1:], start=1):
            reached = levels >= level
            more = output + resize(finer, size)
            if not reached.all():
                more = torch.where(
                    patch_pixels(reached, self.patch, size, size)[:, None], more, output
                )
            output = more
        return output

    def _decode(self, level: int, coarser: Tensor, encoded: Tensor) -> Tensor:
        """A whole level."""
        if level == 0:
            return self.decoder.start(encoded)
        return self.decoder.refine(len(self.heads) - level, coarser, encoded)


def patch_pixels(patches: Tensor, patch: int, size: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Patches ``[N, G, B]`` of a grid of ``size`` to all pixels that they touch in ``to``."""
    pixels = patches.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    pixels = pixels[:, : size[0], : size[1]]
    return pixels if to == size else F.adaptive_max_pool2d(pixels.float(), to) > 0


def computed_share(wanted: Tensor) -> float:
    """Share of the pixels of a level, bool ``[N, H, W]``, that a sparse level would attend to."""
    return float(dilate(wanted, ATTENDED).float().mean())


def _classify(head: nn.Module, decoded: PixelRows) -> Tensor:
    """Logits ``[N, K, H, W]`` by a 1x1 convolution; zero at pixels without rows."""
    assert isinstance(head, nn.Conv2d)
    assert head.bias is not None
    images, height, width = decoded.pixels.shape
    logits = decoded.rows.new_zeros(images * height * width, head.out_channels)
    logits[decoded.pixels.flat] = F.linear(decoded.rows, head.weight.flatten(1), head.bias)
    return logits.view(images, height, width, -1).permute(0, 3, 1, 2)


def level_halos(sizes: list[tuple[int, int]]) -> list[int]:
    """How far around its patches each level is computed, in its pixels, for the finer ones.

    Where sizes double: 0 at the finest level, then 3, 5, 6, 6, ... More than the one pixel that
    resizing of logits needs.
    """
    halos = [0]
    for fine, coarse in pairwise(sizes[::-1]):
        ratio = max(c / f for c, f in zip(coarse, fine, strict=True))
        doubled = fine == (2 * coarse[0], 2 * coarse[1])
        # Otherwise the patches of both levels may end up to a pixel apart.
        halos.append(ceil((halos[-1] + UPSAMPLED) * ratio) + (not doubled))
    return halos[::-1]


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[2], x.shape[3]

"""A hierarchical vision transformer whose later stages attend to the maps of earlier ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from cascade_det.backbones.cross_scale_attention import CrossScaleAttention
from cascade_det.backbones.token_groups import TokenGroupAttention
from cascade_det.backbones.trunk import check_features
from cascade_det.backbones.window_attention import WindowAttention
from cascade_det.backbones.windows import join_windows, pad_to_multiple, split_windows
from cascade_det.layers.conv_norm import freeze

MIXERS = ("window", "token_groups")
_MLP_RATIO = 4


class HierarchicalViT(nn.Module):
    """Stages of patches of 4, 8 and 16 pixels; each but the first looks back at all before it.

    Every stage s embeds the image itself: ``E_s`` is the norm of its patches. Stage 1 begins with
    ``X = E_1``, later ones with ``X = E_s + cross-scale attention`` to the outputs of all stages
    before. Layers follow, see ``Layer``, and a norm. Images are padded with zeros, right and
    bottom, to multiples of the largest patch x the window; padded tokens are tokens like others.

    The network is defined here; CrossFormer (arXiv 2108.00154) is the nearest published one. With
    the defaults it has 8.2 M parameters and takes 82 G multiply-adds at 800 x 1344.

    Linear layers begin as a normal distribution of deviation 0.02, truncated at two deviations,
    their biases and those of attention scores as zeros, convolutions as PyTorch's.

    Args:
        patch_sizes: in pixels, from 4 to 32, each twice the one before.
        widths: channels of the stages, multiples of ``head_width``.
        depths: layers of the stages; 0 is possible.
        head_width: channels of an attention head.
        window: side of attention windows in tokens.
        mixer: of the layers: ``window``, or ``token_groups`` over all tokens of the padded map.
        groups: of ``token_groups``.
        drop_path: probability to skip a branch of the last layer for an image in training (arXiv
            1603.09382); it rises linearly from 0 at the first layer.
        out_features: ``res2`` is the output of patches of 4 pixels, ``res3`` of 8 and so on. Stages
            after the last are not built.
        freeze_at: 0 trains all; 1 freezes the patch embeddings, 2 also the first stage, and so on.

    Attributes:
        channels: output channels by feature name.

    Raises:
        ValueError: for impossible sizes, an unknown mixer or feature name.
    """

    def __init__(
        self,
        *,
        patch_sizes: Sequence[int] = (4, 8, 16),
        widths: Sequence[int] = (64, 128, 256),
        depths: Sequence[int] = (4, 6, 8),
        head_width: int = 32,
        window: int = 7,
        mixer: str = "window",
        groups: int = 8,
        drop_path: float = 0.1,
        out_features: tuple[str, ...] = ("res2", "res3", "res4"),
        freeze_at: int = 0,
    ) -> None:
        super().__init__()
        _check(patch_sizes, widths, depths, head_width, mixer)
        names = [f"res{int(math.log2(size))}" for size in patch_sizes]
        self.out_features = check_features(out_features, names)
        self.channels = {n: w for n, w in zip(names, widths, strict=True) if n in out_features}
        self.step = patch_sizes[-1] * window
        built = 1 + max(names.index(name) for name in out_features)
        self.names = names[:built]
        self.patch_sizes = tuple(patch_sizes[:built])
        self.stem = PatchEmbeddings(patch_sizes=self.patch_sizes, widths=widths[:built])
        count = sum(depths)
        skipped = iter([drop_path * i / max(count - 1, 1) for i in range(count)])
        self.stages = nn.ModuleList()
        for s, (size, width) in enumerate(zip(self.patch_sizes, widths, strict=False)):
            stage = Stage(
                width=width,
                head_width=head_width,
                window=window,
                groups=groups if mixer == "token_groups" else None,
                drop_paths=list(itertools.islice(skipped, depths[s])),
                finer=[(widths[t], size // patch_sizes[t]) for t in range(s)],
            )
            self.stages.append(stage)
        self.apply(_initialise)
        for part in [self.stem, *self.stages][:freeze_at]:
            freeze(part)

    def stem_and_stages(self) -> tuple[nn.Module, list[nn.Module]]:
        """The patch embeddings of all stages, and the stages."""
        return self.stem, list(self.stages)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images ``[N, 3, H, W]`` to the maps of ``out_features``, one row per patch."""
        height, width = images.shape[-2:]
        embedded = self.stem(pad_to_multiple(images, self.step))
        outputs: list[Tensor] = []
        for stage, x in zip(self.stages, embedded, strict=True):
            outputs.append(stage(x, *outputs))
        maps = {}
        for name, size, x in zip(self.names, self.patch_sizes, outputs, strict=True):
            if name in self.out_features:
                # Not -(-a // b): exporters round negative numbers towards zero.
                rows, columns = ((side + size - 1) // size for side in (height, width))
                maps[name] = x[:, :rows, :columns].permute(0, 3, 1, 2)
        return maps


class PatchEmbeddings(nn.Module):
    """The image in patches of several sizes: a convolution and a norm for each."""

    def __init__(self, *, patch_sizes: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(3, width, size, stride=size)
            for size, width in zip(patch_sizes, widths, strict=True)
        )
        self.norms = nn.ModuleList(map(nn.LayerNorm, widths))

    def forward(self, images: Tensor) -> list[Tensor]:
        """``[N, 3, H, W]`` to ``[N, H / p, W / p, C]`` for each size p."""
        return [
            norm(conv(images).permute(0, 2, 3, 1))
            for conv, norm in zip(self.convs, self.norms, strict=True)
        ]


class Stage(nn.Module):
    """Cross-scale attention to ``finer`` maps, if there are any, layers, and a norm.

    Args:
        width: C.
        head_width: channels of an attention head.
        window: side of windows in tokens.
        groups: of token-group attention, which replaces that of windows.
        drop_paths: a probability for each layer.
        finer: width and ratio of resolution of each earlier map.
    """

    def __init__(
        self,
        *,
        width: int,
        head_width: int,
        window: int,
        groups: int | None,
        drop_paths: Sequence[float],
        finer: Sequence[tuple[int, int]],
    ) -> None:
        super().__init__()
        heads = width // head_width
        self.cross_scale = (
            CrossScaleAttention(width=width, heads=heads, window=window, finer=finer)
            if finer
            else None
        )
        self.layers = nn.Sequential(
            *(
                Layer(width=width, heads=heads, window=window, groups=groups, drop_path=drop_path)
                for drop_path in drop_paths
            )
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, embedded: Tensor, *finer: Tensor) -> Tensor:
        """``[N, H, W, C]`` to the same shape; ``finer`` are the outputs of the stages before."""
        x = embedded.to(self.norm.weight.dtype)  # the stem may be of another one
        if self.cross_scale is not None:
            x = x + self.cross_scale(x, *finer)
        return self.norm(self.layers(x))


class Layer(nn.Module):
    """``x + DWConv3x3(x)``, ``x + mixer(norm(x))``, ``x + MLP(norm(x))``.

    The mixer is attention in windows, which the convolution connects, or in token groups.
    """

    def __init__(
        self, *, width: int, heads: int, window: int, groups: int | None, drop_path: float
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm1 = nn.LayerNorm(width)
        self.mixer: nn.Module
        if groups is None:
            self.window = window
            self.mixer = WindowAttention(width=width, heads=heads, window=window)
        else:
            self.window = 1  # windows of one token: raster order
            self.mixer = TokenGroupAttention(width=width, heads=heads, groups=groups)
        self.norm2 = nn.LayerNorm(width)
        hidden = _MLP_RATIO * width
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor) -> Tensor:
        """``[N, H, W, C]`` to the same shape."""
        images, height, width, channels = x.shape
        x = x + self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        # [N, T, C], so that a row of the batch is an image.
        tokens = split_windows(x, self.window).view(images, -1, channels)
        tokens = tokens + self.drop_path(self.mixer(self.norm1(tokens)))
        tokens = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
        return join_windows(tokens, self.window, height, width)


def _check(
    patch_sizes: Sequence[int],
    widths: Sequence[int],
    depths: Sequence[int],
    head_width: int,
    mixer: str,
) -> None:
    if not len(patch_sizes) == len(widths) == len(depths):
        raise ValueError(
            f"patch sizes {patch_sizes}, widths {widths} and depths {depths}: give one of each "
            "per stage"
        )
    doubled = all(2 * a == b for a, b in itertools.pairwise(patch_sizes))
    if not doubled or not set(patch_sizes) <= {4, 8, 16, 32}:
        raise ValueError(
            f"patch sizes {patch_sizes}: give powers of two from 4 to 32, each twice the one before"
        )
    if any(width % head_width for width in widths):
        raise ValueError(f"widths {widths}: give multiples of the head width {head_width}")
    if mixer not in MIXERS:
        raise ValueError(f"unknown mixer {mixer!r}; known: {', '.join(MIXERS)}")


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
        nn.init.zeros_(module.bias)

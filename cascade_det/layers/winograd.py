"""Float32 3x3 convolutions on CPUs with a quarter of the multiplications: Winograd's F(4x4, 3x3).

A direct convolution runs at the peak of the machine already, so what is left is to multiply less
(arXiv 1509.09308). The map is cut into tiles of 4x4 outputs, each seen through 6x6 inputs. Both
sides are transformed, 36 products of matrices over the channels replace 144 per tile, and the
result is transformed back. The transforms are 1-D, along rows and then along columns, and made of
additions of whole slices. Work goes in bands of tile rows that stay in the cache, each done by one
thread from end to end: dozens of short operations are not worth a meeting of all threads after
each, and where other processes want the same cores such meetings take most of the time.

Shapes: N images, C channels in, K out, an H x W map of P x Q tiles.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import ceil, prod
from threading import Barrier, local

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_det.layers import ConvNorm

# Measured on AVX2: below these the transforms cost what the products save.
MIN_CHANNELS = 128
# Above this transformed weights take tens of megabytes each, for small maps.
MAX_CHANNELS = 256
MIN_TILES = 24  # for each thread

_OF_THREAD = local()

# The weight transform at the points 0, 1, -1, 2, -2 and infinity.
_WEIGHT_TRANSFORM = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


def transform_weight(weight: Tensor) -> Tensor:
    """``[K, C, 3, 3]`` to the ``[36, C, K]`` of ``winograd_conv2d``, computed in float64."""
    g = torch.tensor(_WEIGHT_TRANSFORM, dtype=torch.float64, device=weight.device)
    transformed = torch.einsum("ai,kcij,bj->abck", g, weight.detach().double(), g)
    return transformed.flatten(0, 1).to(weight.dtype).contiguous()


def winograd_conv2d(
    x: Tensor,
    transformed_weight: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """What ``conv2d(x, weight, bias, padding=1)`` returns, up to rounding; without gradients.

    Args:
        x: ``[N, C, H, W]``, N, H and W at least 1; fastest channels-last.
        transformed_weight: ``[36, C, K]``, see ``transform_weight``.
        bias: ``[K]``.
        out: ``[N, K, H, W]``, channels-last, takes the result.

    Returns:
        ``[N, K, H, W]``, channels-last.
    """
    x = x.permute(0, 2, 3, 1).contiguous()
    images, height, width, channels = x.shape
    _, _, out_channels = transformed_weight.shape
    tile_rows, tile_columns = ceil(height / 4), ceil(width / 4)
    tiled_shape = images, tile_rows, 4, tile_columns, 4, out_channels
    if out is None or height % 4 or width % 4:
        tiled = x.new_empty(tiled_shape)
    else:
        tiled = out.permute(0, 2, 3, 1).view(tiled_shape)
    out_tiles = tiled.permute(2, 4, 0, 1, 3, 5)
    threads = torch.get_num_threads()
    most_images, most_rows = _band_size(x.shape, threads)
    starts = [
        (image, row)
        for image in range(0, images, most_images)
        for row in range(0, tile_rows, most_rows)
    ]
    left = iter(starts)

    def work() -> None:
        with torch.inference_mode():  # which is set for each thread on its own
            sizes = most_images, most_rows, tile_columns, channels, out_channels
            workspace = _workspace(sum(map(prod, _shapes(*sizes))), x.dtype)
            for image, row in left:
                some = x[image : image + most_images]
                tiles = out_tiles[:, :, image : image + most_images, row : row + most_rows]
                _convolve_band(some, row, transformed_weight, bias, tiles, workspace)

    if threads == 1 or len(starts) == 1:
        work()
    else:
        workers = _workers(threads, os.getpid())
        for done in [workers.submit(work) for _ in range(threads)]:
            done.result()
    whole = tiled.view(images, 4 * tile_rows, 4 * tile_columns, out_channels)
    result = whole[:, :height, :width].permute(0, 3, 1, 2)
    if out is None:
        return result.contiguous(memory_format=torch.channels_last)
    return out.copy_(result) if height % 4 or width % 4 else out


@cache
def _workers(count: int, process: int) -> ThreadPoolExecutor:
    """Threads in which PyTorch's operations are not split up further.

    ``process`` is there because threads do not live on in a fork, while this cache does.
    """
    ready = Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # else the first operation takes the number of all threads
        torch.set_num_threads(1)
        ready.wait()

    workers = ThreadPoolExecutor(count, "winograd", initializer=start)
    try:
        for _ in range(count):
            workers.submit(int)
    except RuntimeError:  # no more threads: those that wait must not wait for ever
        ready.abort()
        raise
    ready.wait()
    torch.set_num_threads(count)  # threads that start later take the number that was set last
    return workers


def _workspace(size: int, dtype: torch.dtype) -> Tensor:
    """That of this thread, which keeps it: what threads free on their own is seldom used again."""
    kept: Tensor | None = getattr(_OF_THREAD, "workspace", None)
    if kept is None or len(kept) < size or kept.dtype != dtype:
        kept = _OF_THREAD.workspace = torch.empty(size, dtype=dtype)
    return kept


def _band_size(shape: Sequence[int], threads: int) -> tuple[int, int]:
    """Images and tile rows at once: enough for fast products, not more than caches hold."""
    images, height, width, channels = shape
    tile_rows, tile_columns = ceil(height / 4), ceil(width / 4)
    tiles = max(128, 32768 // channels)
    bands = ceil(tile_rows * tile_columns / tiles)
    if images < threads:
        bands = ceil(bands / threads) * threads
    most_images = max(tiles // (tile_rows * tile_columns), 1)
    return min(most_images, ceil(images / threads)), ceil(tile_rows / bands)


def _convolve_band(
    x: Tensor,
    row: int,
    transformed_weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    workspace: Tensor,
) -> None:
    """The tile rows of ``x [N, H, W, C]`` from ``row`` on that ``out [4, 4, N, P, Q, K]`` has."""
    *_, images, rows, columns, out_channels = out.shape
    channels = x.shape[3]
    shapes = _shapes(images, rows, columns, channels, out_channels)
    z, v, m, o, scratch = _carve(workspace, shapes)
    _transform_input(_rows(x, 4 * row - 1, 4 * (row + rows) + 1), z, v, scratch)
    torch.bmm(v.view(36, -1, channels), transformed_weight, out=m.view(36, -1, out_channels))
    if bias is not None:
        m[1, 1] += bias  # the point (1, 1) goes into each of the 16 outputs once
    _transform_output(m, o, out, scratch)


def _shapes(n: int, p: int, q: int, c: int, k: int) -> list[tuple[int, ...]]:
    """Of what a band needs: z, v, m, o and scratch."""
    scratch = 2 * max(6 * n * p * q * c, 6 * n * p * q * k, n * p * (4 * q + 2) * c)
    return [
        (6, n, p, 4 * q + 2, c),
        (6, 6, n, p, q, c),
        (6, 6, n, p, q, k),
        (6, n, p, q, 4, k),
        (scratch,),
    ]


def _carve(workspace: Tensor, shapes: list[tuple[int, ...]]) -> Iterator[Tensor]:
    sizes = [prod(shape) for shape in shapes]
    parts = workspace[: sum(sizes)].split(sizes)
    return (part.view(shape) for part, shape in zip(parts, shapes, strict=True))


def _rows(x: Tensor, start: int, stop: int) -> Tensor:
    """Rows ``start`` to ``stop`` of ``[N, H, W, C]``; zeros where there are none."""
    height = x.shape[1]
    rows = x[:, max(start, 0) : min(stop, height)]
    if start >= 0 and stop <= height:
        return rows
    return F.pad(rows, (0, 0, 0, 0, max(-start, 0), max(stop - height, 0)))


def _transform_input(rows: Tensor, z: Tensor, v: Tensor, scratch: Tensor) -> None:
    """``[N, 4 P + 2, W, C]`` to ``v [6, 6, N, P, Q, C]``, by way of ``z [6, N, P, 4 Q + 2, C]``."""
    p, width, q = z.shape[2], rows.shape[2], v.shape[4]
    z[..., :1, :] = 0
    z[..., width + 1 :, :] = 0
    _to_points(
        [rows[:, i : i + 4 * p - 3 : 4] for i in range(6)], z[..., 1 : width + 1, :], scratch
    )
    _to_points([z[..., j : j + 4 * q - 3 : 4, :] for j in range(6)], v.transpose(0, 1), scratch)


def _transform_output(m: Tensor, o: Tensor, out: Tensor, scratch: Tensor) -> None:
    """``m [6, 6, N, P, Q, K]`` to ``out [4, 4, N, P, Q, K]``; ``o [6, N, P, Q, 4, K]`` between."""
    _from_points(m.transpose(0, 1), o.movedim(4, 0), scratch)
    _from_points(o.movedim(4, 1), out, scratch)


def _to_points(d: Sequence[Tensor], v: Tensor, scratch: Tensor) -> None:
    """Six inputs, 1-D, at the six points: ``v[i]`` is row i of the matrix B^T times ``d``."""
    s, t = _temporaries(d[0], scratch)
    torch.sub(d[4], d[2], out=s)
    torch.sub(d[0], d[2], out=t)
    torch.add(s, t, alpha=4, out=v[0])
    torch.sub(d[3], d[1], out=t)
    torch.add(s, t, alpha=2, out=v[3])
    torch.sub(s, t, alpha=2, out=v[4])
    torch.sub(d[5], d[3], out=s)
    torch.sub(s, t, alpha=4, out=v[5])
    torch.sub(d[4], d[2], alpha=4, out=s)
    torch.sub(d[3], d[1], alpha=4, out=t)
    torch.add(s, t, out=v[1])
    torch.sub(s, t, out=v[2])


def _from_points(m: Tensor, out: Tensor, scratch: Tensor) -> None:
    """Four outputs, 1-D, of the six points: ``out[i]`` is row i of the matrix A^T times ``m``."""
    s, t = _temporaries(m[0], scratch)
    torch.add(m[1], m[2], out=s)
    torch.add(m[3], m[4], out=t)
    torch.add(s, t, alpha=4, out=out[2])
    torch.add(s.add_(t), m[0], out=out[0])
    torch.sub(m[1], m[2], out=s)
    torch.sub(m[3], m[4], out=t)
    torch.add(s, t, alpha=2, out=out[1])
    torch.add(s.add_(t, alpha=8), m[5], out=out[3])


def _temporaries(like: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    size = like.numel()
    return scratch[:size].view(like.shape), scratch[size : 2 * size].view(like.shape)


class WinogradConv2d(nn.Module):
    """A 3x3 convolution of stride 1 and padding 1 for inference, same weights under the same names.

    The direct convolution is called where that is faster (few tiles), and where this one does not
    apply: types other than float32, devices other than CPUs, autocast, gradients, empty batches.

    Args:
        conv: the convolution to replace; its parameters, and its norm where it has one, are shared.
            The transformed weight takes four times the memory of the weight, and follows
            ``load_state_dict``, but no other change of the weight.

    Raises:
        ValueError: for a convolution that is not 3x3 with stride, dilation and groups 1, padding 1.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        if not _is_plain_3x3(conv):
            raise ValueError(f"not 3x3 with stride, dilation, groups and padding 1: {conv}")
        self.weight = conv.weight
        self.bias = conv.bias
        self.norm = conv.norm if isinstance(conv, ConvNorm) else None
        self.transformed: Tensor
        self.register_buffer("transformed", transform_weight(conv.weight), persistent=False)
        self.train(conv.training)
        self.register_load_state_dict_post_hook(_transform_again)

    def forward(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """``[N, C, H, W]`` to ``[N, K, H, W]``, channels-last; written to ``out`` if given."""
        if self._pays(x):
            x = winograd_conv2d(x, self.transformed, self.bias, out=out)
        else:
            x = x.contiguous(memory_format=torch.channels_last)
            x = F.conv2d(x, self.weight, self.bias, padding=1)
        if self.norm is not None:
            x = self.norm(x)
        return x if out is None or x is out else out.copy_(x)

    def _pays(self, x: Tensor) -> bool:
        if x.device.type != "cpu" or {x.dtype, self.transformed.dtype} != {torch.float32}:
            return False
        if torch.is_autocast_enabled("cpu"):
            return False
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return False
        return x.shape[0] * ceil(x.shape[2] / 4) * ceil(x.shape[3] / 4) >= (
            MIN_TILES * torch.get_num_threads()
        )

    def extra_repr(self) -> str:
        """Channels in and out."""
        out_channels, in_channels = self.weight.shape[:2]
        return f"{in_channels}, {out_channels}"


def _transform_again(module: WinogradConv2d, incompatible_keys: object) -> None:
    module.transformed.copy_(transform_weight(module.weight))


def use_winograd(module: nn.Module) -> int:
    """Replace the 3x3 convolutions inside ``module`` for which it pays, in place.

    These are ``Conv2d`` and ``ConvNorm`` in evaluation mode, with float32 weights on the CPU,
    stride, dilation and groups 1, padding 1, and from ``MIN_CHANNELS`` to ``MAX_CHANNELS`` channels
    in and out.
    A convolution that is found under several names is replaced by one module.

    Returns:
        How many were replaced; ``module`` itself is not.
    """
    replaced: dict[nn.Module, WinogradConv2d] = {}
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if not isinstance(child, nn.Conv2d) or not _is_worth_it(child):
                continue
            if child not in replaced:
                replaced[child] = WinogradConv2d(child)
            setattr(parent, name, replaced[child])
    return len(replaced)


def _is_worth_it(conv: nn.Conv2d) -> bool:
    return (
        type(conv) in (nn.Conv2d, ConvNorm)
        and _is_plain_3x3(conv)
        and not conv.training
        and conv.weight.dtype == torch.float32
        and conv.weight.device.type == "cpu"
        and min(conv.in_channels, conv.out_channels) >= MIN_CHANNELS
        and max(conv.in_channels, conv.out_channels) <= MAX_CHANNELS
    )


def _is_plain_3x3(conv: nn.Conv2d) -> bool:
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == conv.dilation == conv.padding == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )

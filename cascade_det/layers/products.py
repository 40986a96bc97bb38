"""Matrix products by the faster of PyTorch's two libraries for CPUs, MKL and oneDNN."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor


@cache
def mkl_lacks_avx512() -> bool:
    """Whether MKL, which runs PyTorch's float32 products, leaves AVX-512 unused.

    It has these kernels for Intel's processors only; oneDNN's are up to twice as fast on others.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not _has_onednn():
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "GenuineIntel" not in cpuinfo.read_text(encoding="utf-8")


def batched_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b``, float32 on a CPU: ``[B, m, C]`` and ``[B, C, K]`` to ``[B, m, K]``."""
    if not mkl_lacks_avx512():
        torch.bmm(a, b, out=out)
        return
    for left, right, result in zip(a, b, out, strict=True):
        result.copy_(torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], ""))


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """``out = relu(x @ weight.T + bias)``, for inference.

    Args:
        x: ``[m, C]``; further rows are ignored. oneDNN prepares a kernel for each new number of
            rows, which takes as long as some products.
        weight: ``[K, C]``.
        bias: ``[K]``.
        out: ``[m, K]``, gets the result.
    """
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    if on_cpu and len(x) and _has_onednn():
        result = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu", [], "")
        out.copy_(result[: len(out)])
    else:
        torch.relu_(torch.addmm(bias, x[: len(out)], weight.t(), out=out))


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

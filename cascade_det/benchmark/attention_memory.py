"""Memory and time of token-group attention beside plain attention over the same tokens.

Each case is a forward and a backward pass over one sequence, in a process of its own, with score
matrices stored and with fused attention.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cascade_det.backbones.attention import attend
from cascade_det.backbones.token_groups import TokenGroupAttention
from cascade_det.benchmark.memory import peak_memory
from cascade_det.benchmark.options import Options
from cascade_det.benchmark.timing import alternate, spread
from cascade_det.report.tables import Metrics, table

logger = logging.getLogger(__name__)

TOKENS = (1024, 2048, 4096, 8192, 16384)
GROUPS = (4, 8, 16)
_MEBI = 2**20
# One head: plain attention over 16,384 tokens then stores 1 GiB per copy of its scores.
_WIDTH = 32
# By name: what computes the attention, and whether its scores are stored.
_KERNELS = {
    "stored": [SDPBackend.MATH],
    "fused": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}


class PlainAttention(nn.Module):
    """Every token attends to every token; the same projections as ``TokenGroupAttention``."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, N, C]`` to the same shape."""
        queries, keys, values = self.qkv(tokens).chunk(3, dim=-1)
        return self.proj(attend(queries, keys, values, self.heads))


def compare_attention(
    options: Options, tokens: Sequence[int] = TOKENS, groups: Sequence[int] = GROUPS
) -> list[dict[str, Any]]:
    """Measure plain attention and each number of groups.

    Args:
        options: device, threads, rounds, warm-up and seconds count.
        tokens: numbers of tokens N.
        groups: numbers of groups G.

    Returns:
        One entry per scores (stored or fused), N and G, with G = 1 for plain attention:
        ``scores``, ``tokens``, ``groups``, ``bytes`` above the start, ``ms`` (a ``spread``), and
        shares of plain attention: ``of_bytes``, ``of_ms`` and, as counted, ``of_scores``.
    """
    entries: list[dict[str, Any]] = []
    for scores in _KERNELS:
        for count in tokens:
            builds = {g: partial(_build, options.device, scores, count, g) for g in (1, *groups)}
            calls = {str(g): _numbered(build()) for g, build in builds.items()}
            times = alternate(
                calls,
                rounds=options.rounds,
                warmup=options.warmup,
                seconds=options.seconds,
                device=options.device,
            )
            del calls
            cases: list[dict[str, Any]] = [
                {
                    "scores": scores,
                    "tokens": count,
                    "groups": g,
                    "bytes": peak_memory(build, device=options.device, threads=options.threads)[
                        "above_model"
                    ],
                    "ms": spread(times[str(g)]),
                    "of_scores": 1.0 if g == 1 else 1 / g + g / count,
                }
                for g, build in builds.items()
            ]
            for case in cases:
                case["of_bytes"] = case["bytes"] / cases[0]["bytes"]
                case["of_ms"] = case["ms"]["median"] / cases[0]["ms"]["median"]
            entries += cases
            logger.info("Scores %s, %d tokens: done", scores, count)
    return entries


def attention_section(entries: Sequence[Metrics]) -> str:
    """The results of ``compare_attention`` as a table in Markdown."""
    rows = [
        (
            entry["scores"],
            entry["tokens"],
            "plain" if entry["groups"] == 1 else entry["groups"],
            entry["bytes"] / _MEBI,
            entry["of_bytes"],
            entry["of_scores"],
            entry["ms"]["median"],
            entry["of_ms"],
        )
        for entry in entries
    ]
    headers = ["scores", "tokens N", "groups G", "MiB above the start", "of plain"]
    headers += ["(N^2/G + G N) / N^2", "ms", "of plain"]
    return table(
        f"Attention in token groups, forward and backward, one head of {_WIDTH}",
        headers,
        rows,
        ("", "", "", ".1f", ".3f", ".3f", ".1f", ".3f"),
    )


def _build(device: str, scores: str, tokens: int, groups: int) -> partial[None]:
    torch.manual_seed(0)
    module = (
        PlainAttention(width=_WIDTH, heads=1)
        if groups == 1
        else TokenGroupAttention(width=_WIDTH, heads=1, groups=groups)
    )
    step = partial(_step, module.to(device), scores)
    step(torch.randn(1, 64, _WIDTH, device=device))  # loads code that is not to be counted
    return partial(step, torch.randn(1, tokens, _WIDTH, device=device))


def _step(module: nn.Module, scores: str, tokens: Tensor) -> None:
    with sdpa_kernel(_KERNELS[scores]):
        module(tokens).square().mean().backward()


def _numbered(call: partial[None]) -> Callable[[int], None]:
    return lambda number: call()

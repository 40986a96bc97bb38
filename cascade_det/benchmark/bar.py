"""What is claimed, against whom, and by how much; held against what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Claim:
    """Ours is at least so many times as fast as a peer.

    Attributes:
        what: in words.
        measurement: where its ratio is: "heads", "whole" or "training".
        own: name of the contender.
        peer: likewise.
        least: the ratio.
        device: "cpu" or "cuda", where it is made for one of them alone.
        batch: images; ``None`` for the first batch that was measured.
    """

    what: str
    measurement: str
    own: str
    peer: str
    least: float
    device: str | None = None
    batch: int | None = None


# What a device computes in a type that it has no instructions for says little of others.
EMULATED = ", emulated: no instructions for its type"

CLAIMS = (
    Claim("RoI heads, with exits", "heads", "ours-fast-exits", "detectron2-cascade", 12.0),
    Claim(
        *("RoI heads, with exits", "heads", "ours-fast-exits", "detectron2-one-stage-autocast"), 5.0
    ),
    Claim("RoI heads, exits off, float32", "heads", "ours", "detectron2-cascade", 2.2),
    Claim("RoI heads, exits off, optimised", "heads", "ours-fast", "detectron2-cascade", 2.2),
    Claim("whole model", "whole", "ours-fast-exits", "detectron2-cascade", 6.0, "cpu"),
    Claim("whole model", "whole", "ours-fast-exits", "detectron2-cascade-autocast", 4.0, "cpu"),
    Claim("whole model", "whole", "ours-fast-exits", "torchvision", 4.0, "cpu"),
    *(
        Claim("whole model", "whole", "ours-fast-exits", peer, least, "cuda", batch)
        for batch in (1, 8)
        for peer, least in (("detectron2-cascade", 2.5), ("detectron2-cascade-autocast", 1.6))
    ),
    Claim("training step", "training", "ours", "detectron2-cascade", 3.0),
    Claim("training step, mixed precision", "training", "ours-amp", "detectron2-cascade", 3.0),
)


# Peak memory beside the peer's, and AP beside that of the plain cascade.
_MOST_MEMORY = 1.0
_LARGEST_DROPS = {"AP": 0.1, "AP75": 0.2}
_MEMORY_PEER = "detectron2-cascade"


def hold_claims(
    results: Mapping[str, Any], claims: Sequence[Claim] = CLAIMS
) -> list[dict[str, Any]]:
    """The claims as far as they were measured, figures as they are.

    Args:
        results: of ``run.run``.
        claims: on speed; those made for another device are left out.

    Returns:
        ``what``, ``contender``, ``against``, ``batch``, ``proposals``, ``ratio`` (a spread where
        it is a speed; of memory the quotient, of AP the difference in points), ``bar`` (in words)
        and, of speeds, ``least`` and ``measurement``.
    """
    device = results["machine"]["device"].partition(":")[0]
    wanted = [claim for claim in claims if claim.device in (None, device)]
    speeds = [row for claim in wanted for row in _speeds(results, claim)]
    return [*speeds, *_memories(results), *_accuracies(results)]


def _speeds(results: Mapping[str, Any], claim: Claim) -> Iterator[dict[str, Any]]:
    """The claim on the one comparison that it is about: that with the most proposals."""
    made = [
        comparison
        for comparison in results.get(claim.measurement) or ()
        if claim.batch in (None, comparison["batch"])
    ]
    if not made:
        return
    comparison = max(made, key=lambda comparison: comparison.get("proposals") or 0)
    for entry in comparison["ratios"]:
        if (entry["what"], entry["against"]) == (claim.own, claim.peer):
            peer = (results.get("contenders") or {}).get(claim.peer, "")
            yield {
                "what": claim.what + (EMULATED if peer.endswith(EMULATED) else ""),
                "contender": claim.own,
                "against": claim.peer,
                "batch": comparison["batch"],
                "proposals": comparison.get("proposals"),
                "ratio": entry["ratio"],
                "bar": f"{claim.least:g} times as fast",
                "least": claim.least,
                "measurement": claim.measurement,
            }


def _memories(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for measurement, figures in (results.get("memory") or {}).items():
        for name, memory in figures["contenders"].items():
            if name != _MEMORY_PEER and "ratio" in memory:
                yield {
                    "what": f"peak memory, {measurement}",
                    "contender": name,
                    "against": _MEMORY_PEER,
                    "batch": figures["batch"],
                    "proposals": figures.get("proposals"),
                    "ratio": memory["ratio"],
                    "bar": f"at most {_MOST_MEMORY:g} of it",
                }


def _accuracies(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    settings = (results.get("accuracy") or {}).get("settings") or [{}]
    first, *others = settings
    for setting in others:
        for name, drop in _LARGEST_DROPS.items():
            yield {
                "what": f"{name}, points",
                "contender": setting["setting"],
                "against": first["setting"],
                "batch": None,
                "proposals": None,
                "ratio": setting[name] - first[name],
                "bar": f"within {drop:g}",
            }

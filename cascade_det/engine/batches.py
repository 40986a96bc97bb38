"""Batches of training, and the parts that they are computed in."""

from __future__ import annotations

from typing import Any

Batch = list[dict[str, Any]]


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """A batch in equal parts, in order.

    Raises:
        ValueError: it cannot be shared equally.
    """
    if parts < 1 or len(batch) % parts:
        raise ValueError(f"{len(batch)} images cannot be computed in {parts} equal parts")
    size = len(batch) // parts
    return [batch[start : start + size] for start in range(0, len(batch), size)]

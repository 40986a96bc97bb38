"""What tells weights from others: SHA-256 of what a file holds of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from cascade_det.weights.files import read_weights


def weights_sha256(path: str | Path) -> str:
    """Of the weights in a file: names, shapes, types and values, whatever else the file has.

    A run's ``model_final.pth`` and its last checkpoint have the same one, and so has what another
    host saved, though the files differ. Reading takes longer than hashing.

    Args:
        path: as of :func:`cascade_det.weights.files.read_weights`.

    Raises:
        CheckpointError: it cannot be read.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(read_weights(path).items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

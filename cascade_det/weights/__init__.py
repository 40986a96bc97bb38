"""Weights: downloaded, read without executing anything, renamed, checked and loaded."""

from cascade_det.weights.addresses import local_path
from cascade_det.weights.completeness import check_finite, differing_shapes
from cascade_det.weights.files import (
    load_torch_file,
    plain_tensor,
    read_weights_file,
    weights_sha256,
)
from cascade_det.weights.loading import load_weights
from cascade_det.weights.safetensors_file import write_safetensors
from cascade_det.weights.transfer import sha256_of

__all__ = [
    "check_finite",
    "differing_shapes",
    "load_torch_file",
    "load_weights",
    "local_path",
    "plain_tensor",
    "read_weights_file",
    "sha256_of",
    "weights_sha256",
    "write_safetensors",
]

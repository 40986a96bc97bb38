"""The origin of a calibration: weights, data, device and version."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from fvcore.common.config import CfgNode

from cascade_det import __version__
from cascade_det.data.annotation_formats import read_annotations
from cascade_det.data.catalog import DatasetSource, is_label_files
from cascade_det.data.coco import CocoDataset
from cascade_det.data.image_names import ALL_LINKS
from cascade_det.text import printable
from cascade_det.weights import local_path, read_weights_file, sha256_of, weights_sha256


def provenance(cfg: CfgNode, data: dict[str, Any], device_name: str) -> dict[str, Any]:
    """Names and hashes, for ``calibration.json``.

    Args:
        cfg: its ``MODEL.WEIGHTS`` may be empty.
        data: of the calibration set, with ``name`` and ``images``, the number that is used.
        device_name: of the calibration.

    Returns:
        ``weights``: ``file``, ``sha256`` of the weights in it (see
        ``cascade_det.weights.weights_sha256``) and ``file_sha256``, as ``sha256sum`` has it;
        ``data``, ``device_name``, and the ``version`` of this package.
    """
    weights = cfg.MODEL.WEIGHTS
    file = local_path(weights) if weights else None
    return {
        "weights": {
            "file": str(weights),
            "sha256": weights_sha256(read_weights_file(file).weights) if file else "",
            "file_sha256": sha256_of(file) if file else "",
        },
        "data": data,
        "device_name": device_name,
        "version": __version__,
    }


def coco_provenance(dataset: CocoDataset, num_images: int) -> dict[str, Any]:
    """``name``, ``json_file``, ``json_sha256`` (of the content if it is no json) and ``images``."""
    return {
        "name": dataset.source.name,
        "json_file": str(dataset.source.json_file),
        "json_sha256": _annotations_sha256(dataset.source),
        "images": num_images,
    }


def _annotations_sha256(source: DatasetSource) -> str:
    if not is_label_files(source.json_file):
        return sha256_of(source.json_file)
    content = read_annotations(source, ALL_LINKS, masks=False).content
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def provenance_comment(source: dict[str, Any]) -> str:
    """Comment lines for the head of a YAML file, from ``provenance``."""
    weights, data = source["weights"], source["data"]
    files = (
        f"{data['json_file']} (SHA-256 {data['json_sha256']})"
        if "json_file" in data
        else f"{data['folder']}"
    )
    lines = (
        f"Calibrated by cascade_det {source['version']} on {source['device_name']}.",
        f"Weights: {weights['file'] or 'none'} (file SHA-256 {weights['file_sha256'] or '-'})",
        f"Data: {data['images']} images of {data['name']}, {files}",
    )
    return "".join(f"# {printable(line)}\n" for line in lines)

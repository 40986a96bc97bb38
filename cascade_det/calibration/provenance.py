"""The origin of a calibration: weights, data, device and version."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from cascade_det import __version__
from cascade_det.data.coco import CocoDataset
from cascade_det.text import printable
from cascade_det.weights import local_path, read_weights_file, sha256_of, weights_sha256


@dataclass(frozen=True)
class Provenance:
    """Names and hashes.

    Attributes:
        weights: ``MODEL.WEIGHTS``; empty for none.
        weights_sha256: of the weights in it, see ``cascade_det.weights.weights_sha256``.
        weights_file_sha256: of the file, as ``sha256sum`` has it.
        data: name of the data set.
        json_file: path of its ground truth.
        json_sha256: of that file.
        images: number of images used.
        device_name: of the calibration.
        version: of this package.
    """

    weights: str
    weights_sha256: str
    weights_file_sha256: str
    data: str
    json_file: str
    json_sha256: str
    images: int
    device_name: str
    version: str = __version__

    @classmethod
    def of(
        cls, cfg: CfgNode, dataset: CocoDataset, num_images: int, device_name: str
    ) -> Provenance:
        """The origin for a detector that was loaded by a configuration, and a data set."""
        weights = cfg.MODEL.WEIGHTS
        file = local_path(weights) if weights else None
        return cls(
            weights=str(weights),
            weights_sha256=weights_sha256(read_weights_file(file).weights) if file else "",
            weights_file_sha256=sha256_of(file) if file else "",
            data=dataset.source.name,
            json_file=str(dataset.source.json_file),
            json_sha256=sha256_of(Path(dataset.source.json_file)),
            images=num_images,
            device_name=device_name,
        )

    def as_dict(self) -> dict[str, Any]:
        """For ``calibration.json``."""
        return {
            "weights": {
                "file": self.weights,
                "sha256": self.weights_sha256,
                "file_sha256": self.weights_file_sha256,
            },
            "data": {
                "name": self.data,
                "json_file": self.json_file,
                "json_sha256": self.json_sha256,
                "images": self.images,
            },
            "device_name": self.device_name,
            "version": self.version,
        }

    def comment(self) -> str:
        """Comment lines for the head of a YAML file."""
        lines = (
            f"Calibrated by cascade_det {self.version} on {self.device_name}.",
            f"Weights: {self.weights or 'none'} (file SHA-256 {self.weights_file_sha256 or '-'})",
            f"Data: {self.images} images of {self.data}, {self.json_file} "
            f"(SHA-256 {self.json_sha256})",
        )
        return "".join(f"# {printable(line)}\n" for line in lines)

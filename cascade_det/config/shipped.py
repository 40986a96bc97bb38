"""The configurations that the package ships, by name."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import cascade_det
from cascade_det.errors import ConfigError

_FOLDER = Path(cascade_det.__file__).parent / "configs"


def config_path(name: str) -> Path:
    """The file of a shipped configuration.

    Args:
        name: such as "COCO-Detection/cascade_rcnn_R_50_FPN_1x.yaml".

    Raises:
        ConfigError: there is none of this name.
    """
    parts = PurePosixPath(name).parts
    path = _FOLDER.joinpath(*parts)
    if ".." in parts or "\0" in name or PurePosixPath(name).is_absolute() or not path.is_file():
        raise ConfigError(f"cascade_det://{name}: the package ships no such configuration.")
    return path

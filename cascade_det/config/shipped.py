"""The configurations that come with the package, by name."""

from __future__ import annotations

import difflib
from pathlib import Path

import cascade_det
from cascade_det.errors import ConfigError

SCHEME = "cascade_det://"
_MAX_SUGGESTIONS = 3


def config_path(name: str) -> Path:
    """The file of a shipped configuration.

    Args:
        name: path below ``configs/``, such as ``COCO-Detection/cascade_rcnn_R_50_FPN_1x.yaml``,
            with or without ``cascade_det://`` before it.

    Raises:
        ConfigError: there is no such file; the message lists similar names.
    """
    name = name.removeprefix(SCHEME)
    folder = Path(cascade_det.__file__).parent / "configs"
    known = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml"))
    if name in known:  # so that no name leaves the folder
        return folder / name
    near = difflib.get_close_matches(name, known, _MAX_SUGGESTIONS, cutoff=0.4)
    listed = f"Similar names: {', '.join(near)}" if near else f"There are {', '.join(known)}"
    raise ConfigError(f"{SCHEME}{name[:200]}: there is no such configuration. {listed}.")

"""The configurations that come with the package, by name."""

from __future__ import annotations

import difflib
from pathlib import Path

import cascade_det
from cascade_det.errors import ConfigError

SCHEME = "cascade_det://"
_MAX_SUGGESTIONS = 3
_FOLDER = Path(cascade_det.__file__).parent / "configs"


def shipped_names() -> list[str]:
    """All shipped configurations, sorted: YAML files and Detectron2's LazyConfigs (``.py``)."""
    names = (path.relative_to(_FOLDER).as_posix() for path in _FOLDER.rglob("*.*"))
    return sorted(name for name in names if name.endswith((".yaml", ".py")))


def config_path(name: str) -> Path:
    """The file of a shipped configuration.

    Args:
        name: path below ``configs/``, such as ``COCO-Detection/cascade_rcnn_R_50_FPN_1x.yaml``,
            with or without ``cascade_det://`` before it.

    Raises:
        ConfigError: there is no such file; the message lists similar names.
    """
    name = name.removeprefix(SCHEME)
    known = shipped_names()
    if name in known:  # so that no name leaves the folder
        return _FOLDER / name
    near = difflib.get_close_matches(name, known, _MAX_SUGGESTIONS, cutoff=0.4)
    listed = f"Similar names: {', '.join(near)}" if near else f"There are {', '.join(known)}"
    raise ConfigError(f"{SCHEME}{name[:200]}: there is no such configuration. {listed}.")

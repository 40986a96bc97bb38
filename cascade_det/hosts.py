"""The two hosts of the cascade, standalone and Detectron2, and the choice between them."""

from __future__ import annotations

import importlib
from types import ModuleType

from cascade_det.errors import ConfigError

_PACKAGES = {"standalone": "standalone", "detectron2": "d2"}
HOSTS = ("auto", *_PACKAGES)


def choose_host(asked: str) -> tuple[str, str]:
    """The host to run, and the reason for it.

    Args:
        asked: one of ``HOSTS``; "auto" is Detectron2 if it can be imported.

    Returns:
        "standalone" or "detectron2", and a clause for the log.

    Raises:
        ConfigError: Detectron2 is asked for but cannot be imported.
    """
    if asked == "standalone":
        return asked, "as --host says"
    try:
        load_host("detectron2")
    # Any error: incompatible versions fail in many ways.
    except Exception as error:
        # The advice that cascade_det.d2 adds to an ImportError does not fit commands.
        reason = error.__cause__ if isinstance(error, ImportError) and error.__cause__ else error
        cause = f"Detectron2 cannot be imported ({type(reason).__name__}: {reason})"
        if asked == "auto":
            return "standalone", f"since {cause}"
        raise ConfigError(
            f"--host detectron2: {cause}. Install it as in docs/detectron2.md, or use "
            "--host standalone."
        ) from error
    return "detectron2", "as --host says" if asked != "auto" else "since it can be imported"


def load_host(name: str) -> ModuleType:
    """Import ``cascade_det.standalone.host`` or ``cascade_det.d2.host``.

    Args:
        name: "standalone" or "detectron2".
    """
    return importlib.import_module(f"cascade_det.{_PACKAGES[name]}.host")

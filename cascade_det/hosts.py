"""The two hosts of a cascade, and which one runs."""

from __future__ import annotations

import importlib
from types import ModuleType

from cascade_det.errors import ConfigError

# The rooms of the package that they are in.
_ROOMS = {"standalone": "standalone", "detectron2": "d2"}
HOSTS = ("auto", *_ROOMS)


def choose_host(asked: str) -> tuple[str, str]:
    """The host to run, and why it is that one.

    Args:
        asked: one of ``HOSTS``; "auto" is Detectron2 where it can be imported.

    Raises:
        ConfigError: Detectron2 is asked for, and cannot be imported.
    """
    if asked == "standalone":
        return asked, "as --host says"
    try:
        load_host("detectron2")
    # Not ImportError alone: versions that do not fit each other fail in many ways.
    except Exception as error:
        # What cascade_det.d2 adds for those who import it themselves is said here otherwise.
        reason = error.__cause__ if isinstance(error, ImportError) and error.__cause__ else error
        cause = f"Detectron2 cannot be imported ({type(reason).__name__}: {reason})"
        if asked == "auto":
            return "standalone", f"since {cause}"
        raise ConfigError(
            f"--host detectron2: {cause}. Install it as the README says under Inside Detectron2, "
            "or take --host standalone."
        ) from error
    return "detectron2", "as --host says" if asked != "auto" else "since it can be imported"


def load_host(name: str) -> ModuleType:
    """What the commands ask of a host: ``cascade_det.standalone.host`` or ``cascade_det.d2.host``.

    Args:
        name: as ``choose_host`` gives it.
    """
    return importlib.import_module(f"cascade_det.{_ROOMS[name]}.host")

"""How a command ends when something stops it that its user can mend."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from cascade_det.errors import CascadeDetError
from cascade_det.parallel.processes import INTERRUPTED
from cascade_det.text import printable

_Arguments = ParamSpec("_Arguments")


def without_traceback(main: Callable[_Arguments, int]) -> Callable[_Arguments, int]:
    """Let a command end with a message and a status instead of a traceback.

    Bad input and paths that cannot be read or written give status 1, and Ctrl-C gives 130.
    """

    @functools.wraps(main)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except CascadeDetError as error:
            _tell(str(error))
        except OSError as error:
            _tell(_path_and_reason(error))
        except KeyboardInterrupt:
            return INTERRUPTED
        return 1

    return run


def _tell(message: str) -> None:
    print(printable(message, lines=True), file=sys.stderr)


def _path_and_reason(error: OSError) -> str:
    if error.filename is None:
        return str(error)
    # What the system says, "file exists", is no reason: a folder was to be made in its place.
    reason = "is no folder" if isinstance(error, FileExistsError) else error.strerror
    return f"{error.filename}: {reason}"

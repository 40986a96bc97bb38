"""Exit statuses and messages in place of tracebacks, for errors that users can fix."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from cascade_det.errors import CascadeDetError
from cascade_det.parallel.signals import INTERRUPTED
from cascade_det.text import printable

_Arguments = ParamSpec("_Arguments")


def without_traceback(main: Callable[_Arguments, int]) -> Callable[_Arguments, int]:
    """Turn a command's errors into a message on stderr and an exit status.

    The status is 1 for bad input and for paths that cannot be read or written, 130 for Ctrl-C.
    """

    @functools.wraps(main)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except CascadeDetError as error:
            message = str(error)
        except OSError as error:
            message = _path_and_reason(error)
        except KeyboardInterrupt:
            return INTERRUPTED
        print(printable(message, lines=True), file=sys.stderr)
        return 1

    return run


def _path_and_reason(error: OSError) -> str:
    if error.filename is None:
        return str(error)
    # "File exists" would be misleading: a folder was to be made there.
    reason = "is not a folder" if isinstance(error, FileExistsError) else error.strerror
    return f"{error.filename}: {reason}"

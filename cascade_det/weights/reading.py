"""Turns every failure to read a file of weights into a ``CheckpointError``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cascade_det.errors import CheckpointError


@contextmanager
def reading(path: Path, kind: str, *, details: bool = True) -> Iterator[None]:
    """Read a file within the block: a damaged one can raise any exception.

    Args:
        path: for the message.
        kind: what the file should be, such as "a PyTorch file".
        details: whether the message quotes the exception.

    Raises:
        CheckpointError: the block failed.
    """
    try:
        yield
    except CheckpointError:
        raise
    except PermissionError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    except Exception as error:
        quoted = f": {str(error)[:200]}" if details else ""
        raise CheckpointError(
            f"{path}: cannot be read as {kind} ({type(error).__name__}{quoted}). It is probably "
            "truncated or of another kind: fetch or save it again."
        ) from error

"""The real Detectron2, for the tests that compare with it or run inside it."""

import pytest


def require_detectron2():
    """Skip what calls this where Detectron2, or a package that it needs, cannot be imported."""
    pytest.importorskip(
        "detectron2.engine",
        reason="needs Detectron2, which cannot be imported: see the README, Inside Detectron2",
        exc_type=ImportError,
    )

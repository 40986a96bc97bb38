"""What is said while libraries are imported, and what is said where one is missing."""

import importlib
import subprocess
import sys
import warnings

import pytest

from cascade_det.hosts import choose_host
from cascade_det.quiet_imports import without_jit_warning

REMARK = "`torch.jit.script` is deprecated. Please switch to `torch.compile` or `torch.export`."


def test_that_remark_alone_is_silenced_and_there_alone():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with without_jit_warning():
            warnings.warn(REMARK, FutureWarning, stacklevel=1)
            warnings.warn("`torch.jit.trace` is deprecated.", FutureWarning, stacklevel=1)
            warnings.filterwarnings("ignore", "of a library's own")
        warnings.warn(REMARK, FutureWarning, stacklevel=1)
        warnings.warn("of a library's own", UserWarning, stacklevel=1)
    assert [str(w.message) for w in caught] == ["`torch.jit.trace` is deprecated.", REMARK]


def test_a_command_that_counts_operations_begins_without_it():
    code = "import cascade_det.engine.head_flops, sys; assert 'fvcore.nn.focal_loss' in sys.modules"
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def without_detectron2(monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == "detectron2" or name.startswith("cascade_det.d2"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "detectron2", None)


def test_the_plugin_says_what_it_lacks(without_detectron2):
    with pytest.raises(ModuleNotFoundError, match=r"Install it .*cascade_det\.standalone") as error:
        importlib.import_module("cascade_det.d2")
    assert error.value.name == "detectron2.engine"
    host, why = choose_host("auto")
    assert host == "standalone"
    assert "cascade_det.d2" not in why

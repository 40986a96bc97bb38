"""What pip installs trains, evaluates and predicts, far from the checkout and without network."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from cascade_det import __version__
from cascade_det.model_zoo import list_configs

ROOT = Path(__file__).parents[1]
INSTANT = "cascade_det://quick_schedules/instant_test.yaml"
PIP_OPTIONS = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]


def run(*command, folder, path=""):
    """Run a command in a folder, with this Python path alone; returns its output."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what is packed, since a build writes to its folder."""
    folder = tmp_path_factory.mktemp("build") / "source"
    for name in ("cascade_det", "configs", "docs", "tools"):
        shutil.copytree(
            ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("*.pyc")
        )
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source):
    """The wheel made from the source distribution."""
    program = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    run(sys.executable, "-c", program, folder=source)
    (packed,) = source.parent.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert {"tools/train_net.py", "docs/design.md"} <= members.keys()
    assert all(members[f"cascade_det/configs/{name}"].isfile() for name in list_configs())
    pip = [sys.executable, "-m", "pip", "wheel", *PIP_OPTIONS]
    run(*pip, "--wheel-dir", "..", packed, folder=source)
    (made,) = source.parent.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def site(wheel):
    """An empty folder in which the wheel was installed."""
    folder = wheel.parent / "site"
    pip = [sys.executable, "-m", "pip", "install", *PIP_OPTIONS]
    run(*pip, "--target", folder, wheel, folder=wheel.parent)
    return folder


def test_the_wheel_is_whole(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(n).decode() for n in names if n.endswith("/METADATA"))
    package, configs = ROOT / "cascade_det", ROOT / "configs"
    wanted = {path.relative_to(ROOT) for path in package.rglob("*.py")}
    wanted |= {
        Path("cascade_det", path.relative_to(ROOT))
        for path in configs.rglob("*")
        if path.suffix in (".py", ".yaml")
    }
    wanted |= {path.relative_to(ROOT) for path in (package / "serving" / "page").iterdir()}
    wanted.add(Path("cascade_det", "py.typed"))
    templates = package / "report" / "pages" / "templates"
    wanted |= {path.relative_to(ROOT) for path in templates.iterdir()}
    assert {Path(name) for name in names if "dist-info" not in name} == wanted
    for line in (f"Version: {__version__}", "License-Expression: Apache-2.0"):
        assert f"\n{line}\n" in metadata
    assert "](" not in metadata  # A package index would resolve relative links wrongly.


def test_it_trains_evaluates_and_predicts(site, shapes, shape_options, tmp_path):
    command = [site / "bin" / "cascade-det"]
    module = [sys.executable, "-m", "cascade_det"]
    train = ["train", "--host", "standalone", "--config-file", INSTANT, *shape_options]
    output = run(*command, *train, "OUTPUT_DIR", "trained", folder=tmp_path, path=site)
    assert "Box AP" in output
    weights = ["MODEL.WEIGHTS", "trained/model_final.pth"]
    (tmp_path / "own.yaml").write_text(f"_BASE_: {INSTANT}\nOUTPUT_DIR: evaluated\n")
    evaluate = ["eval", "--host", "standalone", "--config-file", "own.yaml", *shape_options]
    run(*module, *evaluate, *weights, folder=tmp_path, path=site)
    trained, evaluated = (
        json.loads((tmp_path / name / "results.json").read_text())
        for name in ("trained", "evaluated")
    )
    assert evaluated["bbox"] == trained["bbox"]
    predict = ["predict", "--config-file", "trained/config.yaml", "--input", shapes / "val"]
    predict += ["--output", "pictures", "--opts", *weights]
    run(*command, *predict, folder=tmp_path, path=site)
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {"predictions.json", *(path.name for path in (shapes / "val").iterdir())}


def test_configurations_are_resources_of_the_package(site, tmp_path):
    program = (
        "from importlib.resources import files\n"
        "print(*sorted(map(str, files('cascade_det.configs').iterdir())), sep='\\n')"
    )
    found = run(sys.executable, "-c", program, folder=tmp_path, path=site).splitlines()
    names = sorted(path.name for path in (ROOT / "configs").iterdir())
    assert found == [str(site / "cascade_det" / "configs" / name) for name in names]


@pytest.mark.parametrize("flags", [[], ["--editable"]], ids=["copied", "editable"])
def test_a_folder_is_installed_as_well(source, tmp_path, flags):
    home = tmp_path / "venv"
    venv.create(home)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install"]
    run(*pip, *PIP_OPTIONS, *flags, source, folder=tmp_path)
    program = "import cascade_det, importlib.metadata as m; print(cascade_det.__file__)"
    file = run(home / "bin" / "python", "-c", program, folder=tmp_path).strip()
    assert Path(file).is_relative_to(source if flags else home)
    command = home / "bin" / "cascade-det"
    assert run(command, "--version", folder=tmp_path) == f"{__version__}\n"
    output = run(command, "print-config", "--config-file", INSTANT, folder=tmp_path)
    assert "configs/quick_schedules/instant_test.yaml:" in output

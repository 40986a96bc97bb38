"""The house of docs/design.md: who may import whom, and what stays light.

The rules are checked on the syntax trees, so an import inside a function counts as well. Each rule
is also shown to fail, on a small package that breaks it.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cascade_det"
MAX_LINES = 400

# A room is a folder or a module right inside the package; "" is the package's own __init__.
RANKS = {
    "": -1,
    "errors": -1,
    "files": -1,
    "text": -1,
    "quiet_imports": -1,
    "config": 0,
    "layers": 0,
    "parallel": 0,
    "masks": 0,
    "detection_formats": 0,
    "core": 1,
    "model_zoo": 1,
    "backbones": 1,
    "data": 2,
    "weights": 2,
    "report": 2,
    "segmentation": 2,
    "evaluation": 3,
    "onnx_predictor": 3,
    "streams": 4,
    "engine": 4,
    "calibration": 5,
    "monitoring": 5,
    "standalone": 6,
    "d2": 6,
    "hosts": 7,
    "facade": 7,
    "offline": 7,
    "benchmark": 7,
    "serving": 7,
    "commands": 8,
    "__main__": 9,
}
# Where a library may be imported; one that is not named here may be imported everywhere.
HOMES = {
    "detectron2": {"d2", "benchmark"},
    "fvcore.common.registry": {"d2"},
    "torchvision.models": {"backbones", "standalone", "benchmark"},
    "timm": {"backbones"},
    "starlette": {"serving"},
    "uvicorn": {"serving"},
    "triton": {"layers"},
    "av": {"streams"},
    "trackers": {"streams"},
    "pyarrow": {"offline"},
    "ray": {"offline"},
    "tools": set(),
}
# Rooms and modules that live on these libraries (and the standard one) alone.
DIETS = {
    "config": {"fvcore", "iopath", "yacs", "yaml"},
    "layers": {"torch", "torchvision.ops"},
    "layers/triton_nms": {"torch", "triton"},
    "layers/triton_roi_align": {"torch", "triton"},
    "masks": {"numpy", "pycocotools", "torch", "torchvision.ops"},
    "masks/pasting": {"numpy"},
    "masks/polygons": {"numpy", "pycocotools"},
    "masks/rle": {"numpy", "pycocotools"},
    "masks/segmentation": {"numpy", "pycocotools"},
    "detection_formats": {"numpy", "supervision"},
    "core": {"torch", "torchvision.ops"},
    "core/structures/outputs": {"supervision", "torch"},  # its types
    "backbones": {"timm", "torch", "torchvision"},
    "segmentation": {"torch"},
    "data/coco_results": {"numpy", "pycocotools"},
    "report/colors": {"numpy"},
    "report/drawing": {"cv2", "numpy"},
    "report/label_drawing": {"cv2", "numpy"},
    "report/mask_drawing": {"cv2", "numpy"},
    "onnx_predictor": {"numpy", "onnxruntime"},
    "streams": {"av", "cv2", "numpy", "PIL", "supervision", "trackers"},
}
# Constructors there take plain values: they know nothing of configuration.
WITHOUT_CONFIG = {"core", "backbones", "segmentation"}


def violations(package: Path) -> list[str]:
    """Every broken rule in a package folder, as ``file:line: what``."""
    found = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        room = room_of(name)
        if room not in RANKS:
            found.append(f"{name}:1: room {room!r} has no rank")
            continue
        text = path.read_text()
        if (lines := len(text.splitlines())) > MAX_LINES:
            found.append(f"{name}:{lines}: longer than {MAX_LINES} lines")
        for line, target in imported(ast.parse(text), (package.name, *name.parent.parts)):
            complaint = complain(package.name, name, target)
            if complaint:
                found.append(f"{name}:{line}: {complaint}")
    return found


def room_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py").removesuffix("__init__")


def imported(tree: ast.AST, folder: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of all that a module imports; ``folder`` is its package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(folder[: len(folder) + 1 - node.level]) if node.level else []
            base += [node.module] if node.module else []
            yield from ((node.lineno, ".".join([*base, a.name])) for a in node.names)


def complain(package: str, module: Path, target: str) -> str | None:
    """What is wrong with a module of the package importing ``target``, or None."""
    room = room_of(module)
    if within(target, package):
        return complain_of_own(room, [*target.split("."), ""][1])
    for library, homes in HOMES.items():
        if within(target, library) and room not in homes:
            return f"{library} is imported outside {sorted(homes)}"
    standard = target.split(".")[0] in sys.stdlib_module_names
    diet = DIETS.get(module.with_suffix("").as_posix(), DIETS.get(room))
    if diet is not None and not standard and not any(within(target, food) for food in diet):
        return f"{room} imports {target}, and may import {sorted(diet)}"
    return None


def complain_of_own(room: str, other: str) -> str | None:
    # `from cascade_det import __version__` names no room: it is the package itself.
    rank = RANKS.get(other, RANKS[""])
    if other == "config" and room in WITHOUT_CONFIG:
        return f"{room} imports config"
    if (room, other) == ("", "facade"):  # for type checkers; tests/facade show that it is lazy
        return None
    if other != room and rank >= RANKS[room] and rank != RANKS[""]:
        return f"{room} (rank {RANKS[room]}) imports {other} (rank {rank})"
    return None


def within(target: str, library: str) -> bool:
    return target == library or target.startswith(library + ".")


def test_the_package_keeps_to_the_design():
    assert len(list(PACKAGE.rglob("*.py"))) > 3, "the package was not found"
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("core/a.py", "import cascade_det.data.coco", "imports data"),
        ("core/a.py", "from cascade_det.config import get_cfg", "core imports config"),
        ("core/a.py", "from cascade_det import config", "core imports config"),
        ("core/a.py", "from ..engine import trainer", "imports engine"),
        ("core/a.py", "def f():\n    import cascade_det.backbones", "imports backbones"),
        ("core/a.py", "from torchvision.models import resnet18", "torchvision.models is imported"),
        ("core/a.py", "import torchvision", "core imports torchvision"),
        ("core/a.py", "import numpy as np", "core imports numpy"),
        ("core/a.py", "import triton", "triton is imported outside"),
        ("layers/a.py", "import triton", "layers imports triton"),
        ("config/a.py", "import torch", "config imports torch"),
        ("report/drawing.py", "import torch", "report imports torch"),
        ("data/a.py", "from cascade_det.evaluation import coco", "imports evaluation"),
        ("engine/a.py", "import cascade_det.standalone", "imports standalone"),
        ("engine/a.py", "import detectron2.engine", "detectron2 is imported outside"),
        ("engine/a.py", "from fvcore.common.registry import Registry", "registry is imported"),
        ("standalone/a.py", "from cascade_det.d2 import heads", "imports d2"),
        ("standalone/a.py", "from detectron2 import layers", "detectron2 is imported outside"),
        ("standalone/a.py", "import tools.train_net", "tools is imported outside"),
        ("d2/a.py", "from cascade_det import standalone", "imports standalone"),
        ("__init__.py", "from cascade_det.standalone import Predictor", "imports standalone"),
        ("errors.py", "from cascade_det.config import get_cfg", "imports config"),
        ("layers/a.py", "from cascade_det.config import get_cfg", "imports config"),
        ("utils/a.py", "import os", "has no rank"),
        ("helpers.py", "import os", "has no rank"),
        ("core/a.py", "# line\n" * (MAX_LINES + 1), "longer than"),
    ],
)
def test_a_broken_rule_is_found(tmp_path, file, line, complaint):
    path = tmp_path / "cascade_det" / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    found = violations(tmp_path / "cascade_det")
    assert len(found) == 1
    assert complaint in found[0]
    assert found[0].startswith(file)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("core/a.py", "import math\nimport torch.nn.functional as F\nfrom torch import nn"),
        ("core/a.py", "from torchvision.ops import roi_align\nimport torchvision.ops.boxes"),
        ("core/a.py", "from .stage import Stage\nfrom cascade_det.core.stage import Stage"),
        ("core/a.py", "from cascade_det import __version__\nfrom ..errors import ConfigError"),
        ("core/a.py", "from cascade_det.layers import ConvNorm"),
        ("config/a.py", "from cascade_det.errors import ConfigError\nfrom yacs import config"),
        ("standalone/a.py", "from cascade_det import config, core, data, engine, evaluation"),
        ("report/plots.py", "import matplotlib"),
        ("backbones/a.py", "from torchvision.models import mobilenet_v2"),
        ("d2/a.py", "from detectron2.modeling import ROI_HEADS_REGISTRY"),
    ],
)
def test_what_is_allowed_passes(tmp_path, file, line):
    path = tmp_path / "cascade_det" / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert violations(tmp_path / "cascade_det") == []


def folder_circle(package: Path) -> list[str]:
    """Folders that import from each other in a ring, by whatever import; empty if there is none."""
    modules = {module_name(package, path): path for path in package.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for path in modules.values():
        parts = (package.name, *path.relative_to(package).parent.parts)
        folder = ".".join(parts)
        for _, target in imported(ast.parse(path.read_text()), parts):
            loaded = target if target in modules else target.rpartition(".")[0]
            if loaded in modules and loaded != package.name:
                other = ".".join((package.name, *modules[loaded].relative_to(package).parent.parts))
                if folder not in (other, package.name) and other != package.name:
                    graph.setdefault(folder, set()).add(other)
    return ring(graph)


def ring(graph: dict[str, set[str]]) -> list[str]:
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_folders_import_from_each_other():
    assert folder_circle(PACKAGE) == []


def test_a_circle_of_folders_is_found(tmp_path):
    exits = tmp_path / "cascade_det" / "core" / "exits"
    exits.mkdir(parents=True)
    (exits / "policy.py").write_text("import torch\n")
    (exits.parent / "cascade.py").write_text("from cascade_det.core.exits.policy import A\n")
    assert folder_circle(tmp_path / "cascade_det") == []
    (exits / "losses.py").write_text("def f():\n    from cascade_det.core.record import B\n")
    assert folder_circle(tmp_path / "cascade_det") == []  # no such module
    (exits.parent / "record.py").write_text("B = 1\n")
    assert set(folder_circle(tmp_path / "cascade_det")) == {
        "cascade_det.core",
        "cascade_det.core.exits",
    }


def import_cycle(package: Path) -> list[str]:
    """Modules that import each other in a ring as they are loaded; empty if there is none."""
    names = {path: module_name(package, path) for path in package.rglob("*.py")}
    modules = set(names.values())
    graph: dict[str, set[str]] = {}
    for path, name in names.items():
        folder = (package.name, *path.relative_to(package).parent.parts)
        # Not those inside functions, nor for type checkers: they run later, or never.
        statements = [n for n in ast.parse(path.read_text()).body if not isinstance(n, ast.If)]
        tops = [n for n in statements if isinstance(n, (ast.Import, ast.ImportFrom))]
        targets = [target for top in tops for _, target in imported(top, folder)]
        # `from a.b import c` loads a.b.c if that is a module, else a.b.
        loaded = (t if t in modules else t.rpartition(".")[0] for t in targets)
        graph[name] = {target for target in loaded if target in modules and target != package.name}
    return ring(graph)


def module_name(package: Path, path: Path) -> str:
    return ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


def test_every_module_can_be_loaded_first():
    """As one is that a new process is told to call something in."""
    assert import_cycle(PACKAGE) == []


def test_a_ring_of_imports_is_found(tmp_path):
    folder = tmp_path / "cascade_det" / "engine"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("from cascade_det.engine import b\n")
    (folder / "b.py").write_text("from cascade_det.engine.c import D\n")
    (folder / "c.py").write_text("def f():\n    import cascade_det.engine.a\n")
    assert import_cycle(tmp_path / "cascade_det") == []
    (folder / "c.py").write_text("from .a import f\n")
    ring = import_cycle(tmp_path / "cascade_det")
    assert {name.rpartition(".")[2] for name in ring} == {"a", "b", "c"}


def test_the_core_loads_alone():
    heavy = ["detectron2", "fvcore", "yacs", "pycocotools", "cv2", "matplotlib", "PIL.Image"]
    heavy += ["triton", "cascade_det.layers.triton_nms", "cascade_det.layers.triton_roi_align"]
    # Those that come with PyTorch itself, as Triton or Pillow may, are not what the core adds.
    program = (
        "import sys, torch, torchvision.ops\n"
        "before = set(sys.modules)\n"
        "import cascade_det.core\n"
        f"print([m for m in {heavy} if m in sys.modules and m not in before])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"

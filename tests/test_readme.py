"""README, docs/ and the other pages: examples run, named files exist, links resolve."""

import ast
import importlib.util
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from torchvision.models import get_weight, mobilenet_v2, mobilenet_v3_large, resnet18

from cascade_det.backbones.torchvision_weights import torchvision_address
from cascade_det.config import check_config, load_config
from cascade_det.standalone.build import build_detector
from cascade_det.weights import load_weights

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "datasets" / "README.md")
}
RECIPE = ROOT / "configs" / "quick_schedules" / "finetune_small.yaml"


def blocks(language, pages=PAGES):
    """(page, text) of each fenced block of a language."""
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(page, text) for page in pages for text in fence.findall(PAGES[page])]


def without_blocks(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def module_exists(name):
    """By its file: to import a module of ``cascade_det.d2`` takes Detectron2."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 200


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_yaml(page, text, tmp_path):
    file = tmp_path / "example.yaml"
    file.write_text(text)
    cfg = load_config(file)
    if "_BASE_" in yaml.safe_load(text):
        check_config(cfg)


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python_parses_and_its_imports_resolve(page, text):
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    for name in sorted(name for name in names if name.startswith("cascade_det")):
        assert resolves(name), name


def resolves(name):
    """Whether a dotted name is a module, or an attribute of one that needs no Detectron2."""
    if module_exists(name):
        return True
    module, _, attribute = name.rpartition(".")
    return module_exists(module) and hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_are_there(page):
    pattern = r"(?<![\w/.:-])((?:configs|tools|datasets|docs|tests|cascade_det)/[\w/.-]+\.\w+)"
    named = {name for name in re.findall(pattern, PAGES[page]) if "shapes/" not in name}
    named |= {f"configs/{name}" for name in re.findall(r"cascade_det://([\w/.-]+)", PAGES[page])}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_map_of_the_design_names_files_that_are_there():
    text = without_blocks(PAGES["docs/design.md"])
    named = set(re.findall(r"`((?:\w+/)*\w+(?:\.py|/))`", text))
    assert len(named) > 50
    places = ROOT, ROOT / "cascade_det"
    assert [n for n in sorted(named) if not any((place / n).exists() for place in places)] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    text = without_blocks(PAGES[page])
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, heading = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if heading:
            assert heading in anchors(path.read_text()), f"{page} links to {target}"


def anchors(text):
    """The headings of a page, as GitHub turns them into anchors."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_pages_of_docs_are_linked_from_the_readme():
    pages = {page for page in PAGES if page.startswith("docs/")}
    pages -= {"docs/description.md"}  # of the package index
    assert [page for page in sorted(pages) if f"({page})" not in PAGES["README.md"]] == []


def test_new_import_paths_of_the_changelog_can_be_found():
    text = PAGES["CHANGELOG.md"]
    rows = re.findall(r"^\| `([\w.]+)` \| `([\w.]+)`", text, re.MULTILINE)
    modules = [(old, new) for old, new in rows if new.startswith("cascade_det.")]
    names = [f"cascade_det.{new}" for _, new in rows if not new.startswith("cascade_det.")]
    if importlib.util.find_spec("detectron2") is None:
        names = [name for name in names if not name.startswith("cascade_det.d2.")]
    assert len(modules) > 50
    assert len(names) > 8
    assert [old for old, _ in modules if module_exists(old)] == []
    assert [new for _, new in modules if not module_exists(new)] == []
    assert [name for name in names if not resolves(name)] == []


def test_the_recipe_and_the_table_have_weights_that_exist_and_their_normalisation():
    cfg = load_config(RECIPE)
    names = re.findall(r"torchvision://([\w.]+\w)`", PAGES["docs/training.md"])
    names.append(cfg.MODEL.WEIGHTS.split("//")[1])
    assert len(names) >= 5
    for name in names:
        assert torchvision_address(name).startswith("https://download.pytorch.org/models/")
        expected = get_weight(name).transforms()
        np.testing.assert_allclose(np.array(expected.mean) * 255, cfg.MODEL.PIXEL_MEAN)
        np.testing.assert_allclose(np.array(expected.std) * 255, cfg.MODEL.PIXEL_STD)
    assert cfg.INPUT.FORMAT == "RGB"  # as Pillow, and so torchvision, reads images
    assert cfg.MODEL.BACKBONE.NAME == "build_mobilenet_v2_fpn_backbone"
    assert cfg.MODEL.WEIGHTS.startswith("torchvision://MobileNet_V2_Weights.")


RESNET_18 = {
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
}
MOBILENET_V3 = {"MODEL.BACKBONE.NAME": "build_mobilenet_v3_large_fpn_backbone"}


@pytest.mark.parametrize(
    ("model", "keys"),
    [(mobilenet_v2, {}), (mobilenet_v3_large, MOBILENET_V3), (resnet18, RESNET_18)],
)
def test_backbones_of_the_table_take_torchvisions_weights_whole(model, keys, tmp_path):
    torch.save(model().state_dict(), tmp_path / "published.pth")
    options = [item for pair in {**keys, "MODEL.DEVICE": "cpu"}.items() for item in pair]
    cfg = load_config(RECIPE, options)
    check_config(cfg)
    detector = build_detector(cfg)
    names = {f"backbone.bottom_up.{name}" for name in detector.backbone.bottom_up.state_dict()}
    loaded = load_weights(detector, tmp_path / "published.pth").loaded
    assert {name for name in names if "num_batches" not in name} <= set(loaded)


def test_the_example_of_prediction_runs(tmp_path, monkeypatch, capsys):
    """On a small detector of random weights, whose boxes all count."""
    base = ROOT / "configs" / "quick_schedules" / "instant_test.yaml"
    (tmp_path / "cells.yaml").write_text(
        f"_BASE_: {base}\nMODEL: {{ROI_HEADS: {{NUM_CLASSES: 2, SCORE_THRESH_TEST: 0.0}}}}\n"
    )
    detector = build_detector(load_config(tmp_path / "cells.yaml"))
    run = {"class_names": ["red cell", "white cell"], "category_ids": [1, 2]}
    weights = tmp_path / "output" / "cells" / "model_final.pth"
    weights.parent.mkdir(parents=True)
    torch.save({"model": detector.state_dict(), "run": run}, weights)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.jpg"), pixels)
    monkeypatch.chdir(tmp_path)
    [(_, example)] = [block for block in blocks("python") if "draw_detections" in block[1]]
    exec(compile(example.replace("threshold=0.5", "threshold=0.0"), "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(re.fullmatch(r"(red|white) cell 0\.\d\d \[.*\]", line) for line in lines)
    drawn = cv2.imread("a_detected.png")
    assert drawn.shape == (60, 80, 3)
    assert (drawn != cv2.imread("a.jpg")).any()

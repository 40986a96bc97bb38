"""Shipped configurations by name, for our loader and for Detectron2's."""

from pathlib import Path

import pytest

import cascade_det
from cascade_det import model_zoo
from cascade_det.config import check_config, load_config
from cascade_det.errors import ConfigError

ROOT = Path(__file__).parents[1]
NAME = "COCO-Detection/cascade_rcnn_R_50_FPN_1x_early_exit.yaml"
LAZY = "lazy/cascade_rcnn_R_50_FPN_1x_early_exit.py"


def test_every_shipped_file_is_listed_and_loads():
    names = model_zoo.list_configs()
    folder = ROOT / "configs"
    assert names == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.yaml"))
    for name in names:
        file = Path(model_zoo.get_config_file(name))
        assert file == Path(cascade_det.__file__).parent / "configs" / name
        assert file.samefile(folder / name)
        assert model_zoo.get_config(name) == load_config(f"cascade_det://{name}")


def test_lazy_configs_are_found_and_not_read():
    """As in ``detectron2.model_zoo``; executing them is up to ``LazyConfig.load``."""
    file = model_zoo.get_config_file(LAZY)
    assert Path(file).samefile(ROOT / "configs" / LAZY)
    for read in (model_zoo.get_config, lambda name: load_config(f"cascade_det://{name}")):
        with pytest.raises(ConfigError, match=r"exit\.py: is a Python file.* Give a YAML file"):
            read(LAZY)
    with pytest.raises(ConfigError, match="is a Python file"):
        load_config(file)


def test_options_are_on_top():
    cfg = model_zoo.get_config(NAME, ["MODEL.CASCADE.EXIT.ENABLED", False])
    check_config(cfg)
    assert not cfg.MODEL.CASCADE.EXIT.ENABLED
    assert model_zoo.get_config(NAME).MODEL.CASCADE.EXIT.ENABLED


@pytest.mark.parametrize("name", ["gone.yaml", "../pyproject.toml", "/etc/passwd", "exits", ""])
def test_unknown_names_are_told(name):
    with pytest.raises(ConfigError, match="there is no such configuration"):
        model_zoo.get_config_file(name)


@pytest.mark.needs_detectron2
def test_the_loader_of_detectron2_takes_the_path():
    pytest.importorskip("detectron2.config", exc_type=ImportError)
    from detectron2.config import get_cfg

    from cascade_det.d2 import add_cascade_config

    cfg = get_cfg()
    add_cascade_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(NAME))
    assert cfg.MODEL.ROI_HEADS.NAME == "EarlyExitCascadeROIHeads"
    assert cfg.MODEL.CASCADE.EXIT.ENABLED

"""What the tests of the configuration share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fvcore.common.config import CfgNode

from cascade_det.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"

Flatten = Callable[[dict[str, Any]], dict[str, Any]]
WriteYaml = Callable[..., Path]


@pytest.fixture
def base_file() -> Path:
    return CONFIGS / "Base-Cascade-RCNN-FPN.yaml"


@pytest.fixture
def cfg(base_file: Path) -> CfgNode:
    """A configuration that the standalone host can build."""
    return load_config(base_file)


@pytest.fixture(scope="session")
def flatten() -> Flatten:
    """Turns a tree into a dict from full keys to values."""

    def leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return lambda node: dict(leaves(node))


@pytest.fixture
def write_yaml(tmp_path: Path) -> WriteYaml:
    def write(text: str, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write

"""What the tests of the configuration share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fvcore.common.config import CfgNode

from cascade_det.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"

WriteYaml = Callable[..., Path]


@pytest.fixture
def base_file() -> Path:
    return CONFIGS / "Base-Cascade-RCNN-FPN.yaml"


@pytest.fixture
def cfg(base_file: Path) -> CfgNode:
    """A configuration that the standalone host can build."""
    return load_config(base_file)


@pytest.fixture
def write_yaml(tmp_path: Path) -> WriteYaml:
    def write(text: str, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def calibrated() -> dict[str, object]:
    """Every key of ``MODEL.CASCADE.EXIT`` for three stages, none with its default."""
    return {
        "ENABLED": True,
        "PRUNE_THRESHOLDS": (0.1, 0.2),
        "PROPOSAL_THRESHOLD": 0.05,
        "TILE_THRESHOLD": 0.1,
        "PRUNE_MARGINS": (0.5, 0.4, 0.3),
        "PRUNE_BEST": 30,
        "PRUNER_THRESHOLDS": (0.0, 0.2, 0.3),
        "REDUNDANCY_IOU": 0.6,
        "THRESHOLDS": (1.5, 0.7),
        "CONFIDENCE": "learned",
        "LOCALISATION": "predicted_iou",
        "LOCALISATION_THRESHOLDS": (0.8, 0.7),
        "REGION_BUDGET": (0, 500, 50),
        "TIME_BUDGET_MS": 12.5,
        "TIME_BUDGET_PER": "batch",
        "GATES_OFF": (0,),
        "LEARNED": ("iou_head", "gate", "pruner"),
        "SCORE_SCALES": (1.1, 1.2, 1.3),
        "SCORE_SHIFTS": (0.1, 0.0, -0.1),
        "EXPECTED_LOSS": 0.012,
        "EXPECTED_LOSS_DEVIATION": 0.003,
        "DEVICE_NAME": "another",
        "WEIGHTS_SHA256": "0" * 64,
    }

"""The YAML files of a calibration, to be merged into a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.calibration.provenance import provenance_comment
from cascade_det.calibration.search import Setting
from cascade_det.config.tree import as_lists
from cascade_det.files import atomic_path

_HEADS = "EarlyExitCascadeROIHeads"


def write_exits(
    cfg: CfgNode,
    setting: Setting,
    path: Path,
    *,
    loss: tuple[float, float],
    score: float,
    source: dict[str, Any],
    device: str = "",
) -> None:
    """Write exits; keys that the setting does not name are off.

    Args:
        cfg: of the model.
        setting: values by keys of ``MODEL.CASCADE.EXIT``.
        path: of the YAML.
        loss: the promised mean agreement loss, and its deviation.
        score: lowest score of a detection that can be lost.
        source: see ``provenance``; written as a comment.
        device: name of the device that the setting depends on; empty for any.
    """
    exits = {
        **config.exit_values(setting),
        # A model keeps its learned parts even where they are not used.
        "ENABLED": bool(setting or cfg.MODEL.CASCADE.EXIT.LEARNED),
        "EXPECTED_LOSS": round(loss[0], 6),
        "EXPECTED_LOSS_DEVIATION": round(loss[1], 6),
        "DEVICE_NAME": device,
        "WEIGHTS_SHA256": source["weights"]["sha256"],
    }
    heads = cfg.MODEL.ROI_HEADS.NAME
    content = {
        "MODEL": {
            "ROI_HEADS": {"NAME": _HEADS if heads == "CascadeROIHeads" else heads},
            # Fresh lists: YAML would write an alias for a repeated value.
            "CASCADE": {"EXIT": {key: as_lists(value) for key, value in exits.items()}},
        },
        "CASCADE": {"SHADOW_SCORE": score},
    }
    text = yaml.safe_dump(content, default_flow_style=None, sort_keys=False)
    with atomic_path(path) as temporary:
        temporary.write_text(provenance_comment(source) + text, encoding="utf-8")

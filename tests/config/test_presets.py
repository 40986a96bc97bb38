"""The exits and augmentations that are shipped to be put on top, and what a log says of exits."""

from __future__ import annotations

from pathlib import Path

import pytest

from cascade_det import config
from cascade_det.config.cascade_keys import EXIT_DEFAULTS
from cascade_det.core import build_exits

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = {name: CONFIGS / "exits" / f"{name}.yaml" for name in ("mobile", "cloud", "throughput")}
BELOW = {
    "plain": CONFIGS / "COCO-Detection" / "cascade_rcnn_R_50_FPN_1x.yaml",
    "early exit": CONFIGS / "COCO-Detection" / "cascade_rcnn_R_101_FPN_3x_early_exit.yaml",
    "demo": CONFIGS / "quick_schedules" / "demo.yaml",
}
NODE = "MODEL.CASCADE.EXIT."


def keys(values):
    return [item for key, value in values.items() for item in (NODE + key, value)]


def rules_of(cfg):
    widths = [8] * len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
    exits = build_exits(config.exit_arguments(cfg), widths, 4, config.rpn_channels(cfg))
    if exits is None:
        return None
    rules = [*exits.rules, *([exits.time_budget] if exits.time_budget else [])]
    return [type(rule).__name__ for rule in rules]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("below", BELOW)
def test_presets_fit_on_top_of_shipped_cascades(below, preset):
    cfg = config.load_config([BELOW[below], PRESETS[preset]])
    config.check_config(cfg)
    model = cfg.MODEL
    ious, weights = model.ROI_BOX_CASCADE_HEAD.IOUS, model.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS
    assert (
        ious
        == {
            "mobile": (0.5, 0.6),
            "cloud": (0.5, 0.6, 0.7, 0.75),
            "throughput": (0.5, 0.6, 0.7),
        }[preset]
    )
    # Centres are predicted in steps of 1/10, 1/20, ... of the box, sizes in twice as large ones.
    for stage, row in enumerate(weights):
        centre, size = 10.0 * (stage + 1), 5.0 * (stage + 1)
        assert tuple(row) == (centre, centre, size, size)
    assert (
        rules_of(cfg)
        == {
            "mobile": ["PruneBelow", "DropCovered", "AcceptConfident", "RegionBudget"],
            "cloud": ["PruneBelow", "DropCovered", "AcceptConfident"],
            "throughput": None,
        }[preset]
    )
    if preset == "mobile":
        assert model.CASCADE.EXIT.THRESHOLDS == (0.85,)
    if preset == "cloud":
        assert model.CASCADE.EXIT.THRESHOLDS == (0.95,)


@pytest.mark.parametrize("name", ["Base-Exits", *PRESETS])
def test_nothing_is_left_of_exits_below(name, write_yaml, calibrated):
    """And no key was forgotten: all of them are set below, for another number of stages."""
    assert calibrated.keys() == EXIT_DEFAULTS.keys()
    assert all(calibrated[key] != EXIT_DEFAULTS[key] for key in calibrated)
    preset = CONFIGS / "exits" / f"{name}.yaml"
    below = write_yaml(config.load_config(BELOW["plain"], keys(calibrated)).dump())
    config.check_config(config.load_config(below))
    cfg = config.load_config([below, preset])
    config.check_config(cfg)
    assert cfg.MODEL.CASCADE.EXIT == config.load_config([BELOW["plain"], preset]).MODEL.CASCADE.EXIT


def test_the_base_of_presets_has_no_rule():
    cfg = config.load_config([BELOW["early exit"], CONFIGS / "exits" / "Base-Exits.yaml"])
    assert rules_of(cfg) == []
    assert config.exit_summary(cfg) == "Exits: 3 stages, IoU 0.5, 0.6, 0.7; no rule is on"


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_turn_a_cascade_without_exits_into_one_with(preset):
    cfg = config.load_config([BELOW["plain"], PRESETS[preset]])
    own = config.load_config(BELOW["plain"], ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"])
    config.merge_config(own, PRESETS[preset])
    assert own == cfg


@pytest.mark.parametrize("name", ["light", "strong"])
@pytest.mark.parametrize("below", BELOW)
def test_augmentations_fit_on_top_of_shipped_cascades(below, name):
    preset = CONFIGS / "augment" / f"{name}.yaml"
    cfg = config.load_config([BELOW[below], preset])
    config.check_config(cfg)
    entries = config.input_arguments(cfg, train=True)["augment"]["entries"]
    assert len(entries) == {"light": 3, "strong": 8}[name]
    changed = config.changed_keys(config.load_config(BELOW[below]), cfg)
    assert list(changed) == ["CASCADE.AUGMENT"]
    again = config.load_config(f"cascade_det://augment/{name}.yaml")
    assert again.CASCADE.AUGMENT == cfg.CASCADE.AUGMENT


def test_an_augmentation_survives_a_dump(write_yaml):
    cfg = config.load_config([BELOW["plain"], CONFIGS / "augment" / "strong.yaml"])
    assert not config.changed_keys(cfg, config.load_config(write_yaml(cfg.dump())))


STAGES = "Exits: 3 stages, IoU 0.5, 0.6, 0.7; "


@pytest.mark.parametrize(
    ("changes", "rules"),
    [
        ({"TILE_THRESHOLD": 0.1}, "the finest map in tiles of an objectness from 0.1"),
        (
            {"TILE_THRESHOLD": 0.1, "LEARNED": ("tile_head",)},
            "the finest map in tiles of a learned score from 0.1; learned tile_head",
        ),
        (
            {"TILE_THRESHOLD": 1.0, "PROPOSAL_THRESHOLD": 0.05},
            "no proposals from the finest map; proposals of an objectness below 0.05",
        ),
        ({"PROPOSAL_THRESHOLD": 0.05}, "proposals of an objectness below 0.05"),
        ({"PRUNE_THRESHOLDS": (0.02,)}, "background below 0.02, 0.02"),
        ({"PRUNE_THRESHOLDS": (0.0, 0.1)}, "background below never, 0.1"),
        (
            {"PRUNE_MARGINS": (1.0, 0.5, 0.25), "PRUNE_BEST": 7},
            "background more than never, 0.5, 0.25 below the score of rank 7",
        ),
        (
            {"PRUNER_THRESHOLDS": (0.3, 0.0, 0.2), "LEARNED": ("pruner",)},
            "background by the pruner below 0.3, never, 0.2; learned pruner",
        ),
        ({"REDUNDANCY_IOU": 0.8}, "redundant from IoU 0.8"),
        ({"REDUNDANCY_IOU": 1.0}, "redundant from IoU 1"),
        ({"THRESHOLDS": (1.01, 0.9)}, "confident from max_prob never, 0.9"),
        ({"THRESHOLDS": (1.0,)}, "confident from max_prob 1, 1"),
        ({"THRESHOLDS": (2,), "CONFIDENCE": "agreement"}, "confident from agreement 2, 2"),
        (
            {"THRESHOLDS": (0.9,), "CONFIDENCE": "learned", "LEARNED": ("gate",)}
            | {"LOCALISATION": "refinement", "LOCALISATION_THRESHOLDS": (0.5, 0.75)},
            "confident from learned 0.9, 0.9 and refinement 0.5, 0.75; learned gate",
        ),
        (
            {"REGION_BUDGET": (300, 0, 20)},
            "at most 300, any number, 20 of an image's regions in a stage",
        ),
        ({"TIME_BUDGET_MS": 40.5}, "at most 40.5 ms per image"),
        ({"REDUNDANCY_IOU": 0.8, "GATES_OFF": (0, 2)}, "redundant from IoU 0.8; off at gate 0, 2"),
        ({"TIME_BUDGET_MS": 40.0, "TIME_BUDGET_PER": "batch"}, "at most 40 ms per batch"),
        (
            {"SCORE_SCALES": (1.0, 1.0, 0.5), "SCORE_SHIFTS": (0.25,)},
            "no rule is on; scores scaled by 1, 1, 0.5 and shifted by 0.25, 0.25, 0.25",
        ),
        (
            {"REDUNDANCY_IOU": 0.5, "EXPECTED_LOSS": 0.0, "EXPECTED_LOSS_DEVIATION": 0.25},
            "redundant from IoU 0.5; expected loss 0 ± 0.25",
        ),
        # What does nothing is not told.
        ({"LOCALISATION": "refinement", "PRUNE_BEST": 3, "TIME_BUDGET_PER": "batch"}, ""),
    ],
)
def test_the_summary_has_what_is_on_with_its_values(changes, rules):
    base = [BELOW["plain"], CONFIGS / "exits" / "Base-Exits.yaml"]
    cfg = config.load_config(base, keys(changes))
    config.check_config(cfg)
    assert config.exit_summary(cfg) == STAGES + (rules or "no rule is on")
    # A part of it is a rule of the real exits.
    named = [part for part in rules.split("; ") if part and not part.startswith(_NO_RULES)]
    assert len(rules_of(cfg)) == len(named)


_NO_RULES = (
    *("off at", "learned", "scores", "expected", "no rule"),
    # Of the tile gate, which looks at no regions.
    *("the finest map in tiles", "no proposals from the finest map"),
)


def test_the_summary_of_exits_that_are_off():
    for changes in ([NODE + "ENABLED", "False"], ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"]):
        cfg = config.load_config(BELOW["early exit"], changes)
        assert config.exit_summary(cfg) == "Exits: off"
    assert config.exit_summary(config.load_config(list(PRESETS.values()))) == "Exits: off"


def test_exits_of_a_segmenter_in_one_line():
    cfg = config.load_config("cascade_det://quick_schedules/segment_shapes.yaml")
    assert config.exit_summary(cfg) == "Exits: off"
    node = "MODEL.CASCADE_DECODER.EXIT"
    cfg.merge_from_list([f"{node}.ENABLED", True, f"{node}.THRESHOLDS", [0.99, 1.5, 0.9]])
    assert config.exit_summary(cfg) == (
        "Exits: patches of 8 pixels, confident from max 0.99, never, 0.9"
    )
    cfg.merge_from_list([f"{node}.KIND", "image", f"{node}.THRESHOLDS", [0.99]])
    assert config.exit_summary(cfg).endswith("images, confident from max 0.99, 0.99, 0.99")

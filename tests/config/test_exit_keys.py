"""``MODEL.CASCADE.EXIT``: every key reaches the policy, and wrong values are refused."""

import pytest
import torch
from fvcore.common.config import CfgNode

from cascade_det import config
from cascade_det.config.cascade_keys import EXIT_DEFAULTS
from cascade_det.core import build_exits
from cascade_det.core.exits.background import KeepNearBest, PruneBelow
from cascade_det.core.exits.budget import RegionBudget
from cascade_det.core.exits.confidence import AcceptConfident, margin, predicted_iou, refinement
from cascade_det.core.exits.redundancy import DropCovered
from cascade_det.errors import ConfigError

NODE = "MODEL.CASCADE.EXIT"
HEADS = ("MODEL.ROI_HEADS.NAME", "EarlyExitCascadeROIHeads")
PLAIN = ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads")
# No rule is on.
OFF = {"ENABLED": True, "PRUNE_THRESHOLDS": (0.0,), "REDUNDANCY_IOU": 1.5}
ALL_PARTS = ("iou_head", "gate", "pruner", "tile_head")


def merge(cfg: CfgNode, heads=HEADS, **values) -> CfgNode:
    options = [*heads]
    for key, value in values.items():
        options += [f"{NODE}.{key}", value if isinstance(value, str) else repr(value)]
    config.merge_config(cfg, None, options)
    return cfg


def build(cfg: CfgNode, **values):
    """The policy of a configuration in which all is off but what is named."""
    config.check_config(merge(cfg, **{**OFF, **values}))
    return build_exits(config.exit_arguments(cfg), [8, 8, 8], 4, config.rpn_channels(cfg))


def rule_of(cfg: CfgNode, kind, **values):
    [rule] = build(cfg, **values).rules
    assert type(rule) is kind
    return rule


def problems(cfg: CfgNode, heads=HEADS, **values) -> list[str]:
    merge(cfg, heads, **values)
    with pytest.raises(ConfigError) as caught:
        config.check_config(cfg)
    return str(caught.value).split("\n  - ")[1:]


class TestEveryKeyReachesThePolicy:
    def test_all_off(self, cfg):
        assert build(cfg).rules == ()

    def test_by_default_background_and_redundant_regions_leave(self, cfg):
        config.check_config(merge(cfg, ENABLED=True))
        prune, redundant = build_exits(config.exit_arguments(cfg), [8, 8, 8], 4).rules
        assert type(prune) is PruneBelow
        assert prune.thresholds == (0.0, 0.02, 0.02)
        assert type(redundant) is DropCovered
        assert redundant.iou == 0.9

    def test_prune_thresholds(self, cfg):
        assert rule_of(cfg, PruneBelow, PRUNE_THRESHOLDS=(0.1,)).thresholds == (0, 0.1, 0.1)
        assert rule_of(cfg, PruneBelow, PRUNE_THRESHOLDS=(0.1, 0.2)).thresholds == (0, 0.1, 0.2)

    def test_proposal_threshold(self, cfg):
        assert rule_of(cfg, PruneBelow, PROPOSAL_THRESHOLD=0.1).thresholds == (0.1, 0, 0)

    def test_margins(self, cfg):
        rule = rule_of(cfg, KeepNearBest, PRUNE_MARGINS=(1, 0.2, 0.3), PRUNE_BEST=7)
        assert rule.margins == (1, 0.2, 0.3)
        assert rule.best == 7
        # One value is that of every gate, also of the one before stage 0.
        assert rule_of(cfg, KeepNearBest, PRUNE_MARGINS=(0.2,)).margins == (0.2, 0.2, 0.2)

    def test_pruner(self, cfg):
        rule = rule_of(cfg, PruneBelow, PRUNER_THRESHOLDS=(0.1, 0, 0.2), LEARNED=("pruner",))
        assert rule.thresholds == (0.1, 0, 0.2)
        parts = rule.measure.__self__
        assert parts.names == ("pruner",)
        assert parts.crop_channels == 4

    @pytest.mark.parametrize("value", [0.8, 1, 0.3])
    def test_redundancy(self, cfg, value):
        assert rule_of(cfg, DropCovered, REDUNDANCY_IOU=value).iou == value

    def test_thresholds_and_confidence(self, cfg):
        rule = rule_of(cfg, AcceptConfident, THRESHOLDS=(1.01, 0.9), CONFIDENCE="margin")
        assert rule.thresholds == (1.01, 0.9)
        assert rule.confidence is margin
        assert rule.localisation is None

    def test_agreement_counts_stages(self, cfg):
        rule = rule_of(cfg, AcceptConfident, THRESHOLDS=(2,), CONFIDENCE="agreement")
        assert rule.thresholds == (2, 2)

    def test_learned_gate(self, cfg):
        exits = build(cfg, THRESHOLDS=(0.9,), CONFIDENCE="learned", LEARNED=("gate",))
        assert exits.rules[0].confidence == exits.learned.readiness

    @pytest.mark.parametrize(
        ("name", "measure"), [("refinement", refinement), ("predicted_iou", predicted_iou)]
    )
    def test_localisation(self, cfg, name, measure):
        rule = rule_of(
            cfg,
            AcceptConfident,
            THRESHOLDS=(0.9,),
            LOCALISATION=name,
            LOCALISATION_THRESHOLDS=(0.7, 0.8),
            LEARNED=("iou_head",),
        )
        assert rule.localisation is measure
        assert rule.localisation_thresholds == (0.7, 0.8)

    def test_region_budget(self, cfg):
        assert rule_of(cfg, RegionBudget, REGION_BUDGET=(0, 300, 100)).most == (0, 300, 100)
        assert rule_of(cfg, RegionBudget, REGION_BUDGET=(300,)).most == (300, 300, 300)

    @pytest.mark.parametrize(("per", "per_image"), [("image", True), ("batch", False)])
    def test_time_budget(self, cfg, per, per_image):
        budget = build(cfg, TIME_BUDGET_MS=40, TIME_BUDGET_PER=per).time_budget
        assert budget.milliseconds == 40
        assert budget.per_image == per_image

    def test_gates_off(self, cfg):
        assert build(cfg).gates_off == set()
        exits = build(cfg, REGION_BUDGET=(9,), GATES_OFF=(0, 2))
        assert [exits.has_gate(stage) for stage in (-1, 0, 1)] == [False, True, False]

    def test_learned_parts(self, cfg):
        assert build(cfg).learned is None
        assert build(cfg, LEARNED=("pruner", "iou_head")).learned.names == ("iou_head", "pruner")

    @pytest.mark.parametrize(("dims", "channels"), [((-1,), 96), ((48,), 48)])
    def test_the_tile_head_reads_the_hidden_map_of_the_rpn(self, cfg, dims, channels):
        assert build(cfg).tile_scorer is None
        cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.RPN.CONV_DIMS = 96, dims
        exits = build(cfg, LEARNED=("tile_head",)).eval()
        assert exits.tile_scorer(torch.zeros(1, channels, 8, 4)).tolist() == [[[0.5], [0.5]]]

    def test_calibration(self, cfg):
        exits = build(cfg, SCORE_SCALES=(0.5, 1, 2), SCORE_SHIFTS=(0.25,))
        assert exits.score_scales == (0.5, 1, 2)
        assert exits.score_shifts == (0.25, 0.25, 0.25)

    def test_all_together_in_the_order_of_the_reasons(self, cfg):
        exits = build(
            cfg,
            PRUNE_THRESHOLDS=(0.1,),
            PRUNE_MARGINS=(0.5,),
            PRUNER_THRESHOLDS=(0.1,),
            REDUNDANCY_IOU=0.7,
            THRESHOLDS=(0.9,),
            REGION_BUDGET=(100,),
            TIME_BUDGET_MS=40.0,
            LEARNED=ALL_PARTS,
        )
        assert [rule.reason for rule in exits.rules] == [
            *["background"] * 3,
            "redundant",
            "confident",
            "budget",
        ]
        assert exits.time_budget.start(1, None).reason == "budget"

    def test_what_was_seen_in_calibration_decides_nothing(self, cfg):
        seen = {"EXPECTED_LOSS": 0.01, "EXPECTED_LOSS_DEVIATION": 0.002, "DEVICE_NAME": "'x'"}
        before = config.exit_arguments(merge(cfg, ENABLED=True))
        config.check_config(merge(cfg, **seen))
        assert config.exit_arguments(cfg) == before

    @pytest.mark.parametrize("stages", [1, 2, 4])
    def test_other_numbers_of_stages(self, cfg, stages):
        options = [
            *("MODEL.ROI_BOX_CASCADE_HEAD.IOUS", repr(tuple(0.5 + i / 10 for i in range(stages)))),
            *("MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", repr(((10.0,) * 4,) * stages)),
        ]
        config.merge_config(cfg, None, options)
        for thresholds in ((0.9,), (0.9,) * (stages - 1)):
            values = {"REGION_BUDGET": (9,), "THRESHOLDS": thresholds}
            config.check_config(merge(cfg, ENABLED=True, **values))
            exits = build_exits(config.exit_arguments(cfg), [8] * stages, 4)
            assert exits.num_stages == stages
            assert exits.thresholds == (0.9,) * (stages - 1)
            assert exits.rules[-1].most == (9,) * stages


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("PRUNE_THRESHOLDS", (1.1,), "from 0 to 1"),
        ("PRUNE_THRESHOLDS", (-0.1,), "from 0 to 1"),
        ("PROPOSAL_THRESHOLD", 1.1, "from 0 to 1"),
        ("TILE_THRESHOLD", 1.1, "from 0 to 1"),
        ("PRUNE_MARGINS", (1.1,), "1 means never"),
        ("PRUNE_MARGINS", (-0.1,), "1 means never"),
        ("PRUNE_BEST", 0, "1 or more"),
        ("PRUNER_THRESHOLDS", (1.1,), "from 0 to 1"),
        ("REDUNDANCY_IOU", 0.0, "above 1 means never"),
        ("THRESHOLDS", (0.0,), "above 1 means never"),
        ("THRESHOLDS", ("high",), "above 1 means never"),
        ("LOCALISATION_THRESHOLDS", (1.5,), "from 0 to 1"),
        ("REGION_BUDGET", (-1,), "0: no limit"),
        ("REGION_BUDGET", (10.5,), "whole numbers"),
        ("GATES_OFF", (-1,), "0 is before stage 0"),
        ("GATES_OFF", (0.5,), "0 is before stage 0"),
        ("GATES_OFF", (3,), "the gates 0 to 2"),
        ("TIME_BUDGET_MS", -1.0, "0 means no limit"),
        ("SCORE_SCALES", (0.0,), "above 0"),
        ("SCORE_SHIFTS", (float("inf"),), "numbers"),
        ("EXPECTED_LOSS_DEVIATION", -0.1, "0 or more"),
        ("WEIGHTS_SHA256", "F" * 64, "64 hexadecimal digits"),
        ("WEIGHTS_SHA256", "abc", "64 hexadecimal digits"),
        ("CONFIDENCE", "maximum", "'max_prob', 'entropy', 'margin', 'agreement', 'learned'"),
        ("LOCALISATION", "iou", "'none', 'refinement', 'predicted_iou'"),
        ("TIME_BUDGET_PER", "region", "'image', 'batch'"),
        ("LEARNED", ("iou",), "'iou_head', 'gate', 'pruner' and 'tile_head'"),
    ],
)
def test_a_wrong_value_is_told(cfg, key, value, remedy):
    merge(cfg, ENABLED=True)
    cfg.MODEL.CASCADE.EXIT[key] = value
    with pytest.raises(ConfigError) as caught:
        config.check_config(cfg)
    [message] = str(caught.value).split("\n  - ")[1:]
    assert message.startswith(f"{NODE}.{key}")
    assert repr(value) in message or str(value) in message
    assert remedy in message


@pytest.mark.parametrize(
    ("key", "value", "may"),
    [
        ("PRUNE_THRESHOLDS", (0.1,) * 3, "1 or 2"),
        ("THRESHOLDS", (0.9,) * 3, "1 or 2"),
        ("LOCALISATION_THRESHOLDS", (0.9,) * 3, "1 or 2"),
        ("PRUNE_MARGINS", (0.9,) * 2, "1 or 3"),
        ("PRUNER_THRESHOLDS", (0.0,) * 2, "1 or 3"),
        ("REGION_BUDGET", (9,) * 2, "1 or 3"),
        ("SCORE_SCALES", (2.0,) * 4, "1 or 3"),
        ("SCORE_SHIFTS", (2.0,) * 2, "1 or 3"),
        ("SCORE_SHIFTS", (), "1 or 3"),
    ],
)
def test_a_wrong_length_is_told(cfg, key, value, may):
    [message] = problems(cfg, ENABLED=True, **{key: value})
    assert f"{NODE}.{key}" in message
    assert f"of length {len(value)}" in message
    assert f"Give {may} values" in message


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"CONFIDENCE": "learned"}, "gate"),
        ({"LOCALISATION": "predicted_iou"}, "iou_head"),
        ({"PRUNER_THRESHOLDS": (0.0, 0.1, 0.0)}, "pruner"),
    ],
)
def test_a_part_that_is_missing_is_told(cfg, values, part):
    others = tuple(name for name in ALL_PARTS if name != part)
    [message] = problems(cfg, ENABLED=True, LEARNED=others, **values)
    [(key, value)] = values.items()
    assert message.startswith(f"{NODE}.{key} is {value!r}")
    assert repr(part) in message
    assert "FREEZE_DETECTOR" in message
    config.check_config(merge(cfg, LEARNED=ALL_PARTS))


def test_parts_without_exits_are_told(cfg):
    [message] = problems(cfg, LEARNED=("gate",))
    assert message.startswith(f"{NODE}.LEARNED is ['gate'], but ENABLED is False")
    assert "Set ENABLED to True, or LEARNED to ()" in message


@pytest.mark.parametrize("key", EXIT_DEFAULTS)
def test_heads_without_exits_are_told(cfg, calibrated, key):
    value = calibrated[key]
    assert type(value) is type(EXIT_DEFAULTS[key])
    found = problems(cfg, PLAIN, **{key: value})
    [message] = [text for text in found if "a cascade without exits" in text]
    assert message.startswith(f"{NODE}.{key} is {value!r}")
    assert "EarlyExitCascadeROIHeads" in message
    assert f"leave the key at {EXIT_DEFAULTS[key]!r}" in message

"""The same exits in both hosts: from one configuration and the same weights, the same outcome."""

import pytest
import torch

pytest.importorskip("detectron2.engine", exc_type=ImportError)

from detectron2.structures import Instances
from small_cascades import make_scene
from small_plugin import build_heads, features_of, proposals_of
from two_hosts import (
    BACKBONES,
    CONFIG,
    OUR_HEADS,
    SAME_KERNEL,
    SMALL,
    build_two,
    detectron2_cfg,
    make_batch,
)

from cascade_det import config
from cascade_det.core import build_exits
from cascade_det.d2.detector import Detector

pytestmark = pytest.mark.needs_detectron2

FILE = """
_BASE_: {base}
MODEL:
  CASCADE:
    EXIT:
      ENABLED: True
      LEARNED: ["iou_head", "gate", "pruner"]
"""
OFF = {"PRUNE_THRESHOLDS": "(0.0,)", "REDUNDANCY_IOU": 1.01}
# With reasons that have to be found at the first gate, and at the two that follow.
POLICIES = {
    "by default": (
        ["PRUNE_THRESHOLDS: (0.35, 0.25)", "REDUNDANCY_IOU: 0.6"],
        set(),
        {"background", "redundant"},
    ),
    "before stage 0": (
        ["PROPOSAL_THRESHOLD: 0.51", "PRUNE_MARGINS: (0.01, 0.2, 0.1)", "PRUNE_BEST: 5"],
        {"background"},
        {"background"},
    ),
    "budgets": (["REGION_BUDGET: (100, 60, 30)"], {"budget"}, {"budget"}),
    "confident": (
        [
            "CONFIDENCE: margin",
            "THRESHOLDS: (0.4, 0.15)",
            "LOCALISATION: refinement",
            "LOCALISATION_THRESHOLDS: (0.5, 0.8)",
            "REDUNDANCY_IOU: 0.7",
            "SCORE_SCALES: (1.5, 1.2, 0.8)",
            "SCORE_SHIFTS: (0.5, 0.2, -0.1)",
        ],
        set(),
        {"confident", "redundant"},
    ),
    "learned": (
        [
            "PRUNER_THRESHOLDS: (0.12, 0.48, 0.3)",
            "CONFIDENCE: learned",
            "THRESHOLDS: (0.78, 0.5)",
            "LOCALISATION: predicted_iou",
            "LOCALISATION_THRESHOLDS: (0.4,)",
        ],
        {"background"},
        {"background", "confident"},
    ),
}


@pytest.fixture(scope="module")
def hosts():
    """With all learned parts, whose answers differ."""
    ours, alone = build_two(
        *BACKBONES["R-18"],
        *SAME_KERNEL,
        *("MODEL.CASCADE.EXIT.ENABLED", True),
        *("MODEL.CASCADE.EXIT.LEARNED", ("iou_head", "gate", "pruner")),
    )
    with torch.no_grad():
        for parameter in ours.model.roi_heads.exits.parameters():
            parameter.normal_(std=0.3)
    alone.model.load_state_dict(ours.model.state_dict(), strict=True)
    return ours, alone


def run(hosts, batch):
    """Detections and statistics of both."""
    ours, alone = hosts
    found = ours.detect(batch)
    output = alone.model.eval().detect(batch)
    return (found, ours.model.roi_heads.stats), (output.detections, output.stats)


def assert_alike(hosts, batch):
    (found, stats), (wanted, wanted_stats) = run(hosts, batch)
    assert stats == wanted_stats
    for ours, theirs in zip(found, wanted, strict=True):
        for name in ("boxes", "scores", "classes", "exit_stages"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert stats.confidence == wanted_stats.confidence
    assert stats.proposed == stats.entered[0] + sum(stats.left_before.values())
    return found, stats


@pytest.fixture
def use(hosts, tmp_path):
    """Gives both hosts the exits of a file, with the parts that they have."""
    before = [host.model.roi_heads.exits for host in hosts]

    def use_file(*lines):
        file = tmp_path / "config.yaml"
        named = {line.split(":")[0] for line in lines}
        rules = [*lines, *(f"{key}: {value}" for key, value in OFF.items() if key not in named)]
        file.write_text(FILE.format(base=CONFIG) + "".join(f"      {rule}\n" for rule in rules))
        options = [*SMALL, *BACKBONES["R-18"], *OUR_HEADS]
        cfgs = detectron2_cfg(options, file), config.load_config(file, options)
        for host, cfg, whole in zip(hosts, cfgs, before, strict=True):
            exits = build_exits(config.exit_arguments(cfg), [64] * 3, 64)
            exits.load_state_dict(whole.state_dict())
            host.model.roi_heads.exits = exits

    yield use_file
    for host, exits in zip(hosts, before, strict=True):
        host.model.roi_heads.exits = exits


@pytest.mark.parametrize("name", POLICIES)
def test_same_detections_and_counts(hosts, use, name):
    lines, before, after = POLICIES[name]
    use(*lines)
    found, stats = assert_alike(hosts, make_batch(3))
    assert min(map(len, found)) > 3
    assert set(stats.left_before) == before
    assert {reason for left in stats.left[:2] for reason in left} == after
    assert stats.left[2]["completed"] > 0


def test_learned_parts_have_one_set_of_names(hosts):
    ours, alone = (
        {name for name in host.model.state_dict() if ".exits." in name} for host in hosts
    )
    assert ours == alone
    assert all(name.startswith("roi_heads.exits.learned.") for name in ours)
    assert {name.split(".")[3] for name in ours} == {"iou_head", "gate", "pruner"}
    heads = hosts[0].model.roi_heads
    heads.follow_predictors()
    assert heads.cascade.exits is heads.exits
    # The parameters have one name each.
    assert len(list(heads.parameters())) == len(dict(heads.named_parameters()))


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class TestTimeBudget:
    """From the image on: the backbone takes 0.3 seconds, a stage 0.1."""

    @pytest.fixture
    def timed(self, hosts, use, monkeypatch):
        hooks = []

        def budget(milliseconds, per="batch"):
            use(f"TIME_BUDGET_MS: {milliseconds}", f"TIME_BUDGET_PER: {per}")
            for host in hosts:
                clock = Clock()
                monkeypatch.setattr(host.model.roi_heads.exits.time_budget, "clock", clock)

                def tick(seconds, clock=clock):
                    def hook(*_):
                        clock.now += seconds

                    return hook

                hooks.append(host.model.backbone.register_forward_hook(tick(0.3)))
                hooks.append(host.cascade.pooler.register_forward_hook(tick(0.1)))
            return Detector(hosts[0].model.eval()), hosts[1].model.eval()

        yield budget
        for hook in hooks:
            hook.remove()

    @pytest.mark.parametrize(
        ("milliseconds", "stages", "overrun"),
        [(650.0, 3, 0), (550.0, 2, 0), (450.0, 1, 0), (100.0, 1, 300)],
    )
    def test_work_from_the_image_on_counts(self, timed, milliseconds, stages, overrun):
        for host in timed(milliseconds):
            stats = host.detect(make_batch(2)).stats
            assert [n > 0 for n in stats.entered] == [stage < stages for stage in range(3)]
            assert stats.overrun_ms == pytest.approx(overrun)
            if stages < 3:
                assert set(stats.left[stages - 1]) == {"budget"}

    def test_without_a_beginning_it_is_where_the_heads_begin(self, timed, hosts):
        timed(350.0)
        heads = hosts[0].model.roi_heads
        hosts[0].detect(make_batch(2))
        assert min(heads.stats.entered) > 0
        assert heads.stats.overrun_ms == 0


class TestProposalsWithoutObjectness:
    def detect(self, *options):
        heads = build_heads(options=["MODEL.CASCADE.EXIT.ENABLED", True, *options])
        scene = make_scene()
        proposals = [
            Instances(p.image_size, proposal_boxes=p.proposal_boxes) for p in proposals_of(scene)
        ]
        with torch.no_grad():
            return heads(None, features_of(scene), proposals)[0]

    def test_are_told_where_exits_look_at_it(self):
        with pytest.raises(ValueError, match="objectness"):
            self.detect("MODEL.CASCADE.EXIT.PROPOSAL_THRESHOLD", 0.1)

    def test_do_where_they_do_not(self):
        assert min(map(len, self.detect())) > 3

"""From a target to a setting: on which images, by which rule, with which promise."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from random_records import CROP_CHANNELS, HIDDEN, make_parts
from recorded_trials import make_calibrator, make_trials

from cascade_det.calibration.calibrator import Calibrator, build_policy, split_images
from cascade_det.calibration.evidence import Evidence
from cascade_det.calibration.image_matching import ImageMatcher
from cascade_det.calibration.latency_model import LatencyModel
from cascade_det.calibration.risk_control import fixed_sequence, hoeffding_bentkus_p_value
from cascade_det.calibration.search import loss_of
from cascade_det.calibration.search_space import exit_paths
from cascade_det.calibration.target import Target
from cascade_det.calibration.trials import Recording
from cascade_det.config import get_cfg
from cascade_det.errors import ConfigError, DatasetError

NOTHING_LEAVES = {
    "PRUNE_THRESHOLDS": (0.0, 0.0),
    "REDUNDANCY_IOU": 2.0,
    "REGION_BUDGET": (0, 0, 0),
}
LATENCY = LatencyModel(5.0, (1.0, 1.0, 1.0), (0.1, 0.1, 0.1), "some CPU", 1, 99, 0.0)


@pytest.fixture(scope="module")
def recorded():
    """Twelve images, in records of two."""
    trials = make_trials(seeds=range(6))
    return trials.recording, trials.matcher


@pytest.fixture(scope="module")
def calibrator(recorded):
    """With the path."""
    made = make_calibrator(*recorded)
    made.try_path()
    return made


@pytest.fixture(scope="module")
def searched(recorded):
    """After a free search."""
    return make_calibrator(*recorded, tries=60)


class TestHalves:
    @pytest.mark.parametrize("count", [4, 11, 12])
    def test_every_image_is_in_one_of_them(self, recorded, count):
        ids = recorded[0].image_ids[:count]
        choosing, reporting = split_images(ids, recorded[1], 0)
        assert choosing == sorted(choosing)
        assert reporting == sorted(reporting)
        assert sorted(choosing + reporting) == list(range(count))
        assert len(reporting) == count // 2
        assert split_images(ids, recorded[1], 0) == (choosing, reporting)
        assert {str(split_images(ids, recorded[1], seed)) for seed in range(5)} != {str(choosing)}

    def test_a_free_search_has_one_and_is_judged_by_the_other(self, recorded, searched):
        ids = np.array(recorded[0].image_ids)
        choosing, reporting = split_images(recorded[0].image_ids, recorded[1], 0)
        assert searched.trials.recording.image_ids == ids[choosing].tolist()
        assert searched.others.recording.image_ids == ids[reporting].tolist()
        assert searched.sequence.evidence.trials is searched.others

    def test_one_without_an_object(self):
        ids = [1, 2, 3, 4]
        box = {"image_id": 3, "category_id": 1, "bbox": [1, 1, 5, 5]}
        content = {
            "images": [{"id": i, "height": 50, "width": 50} for i in ids],
            "categories": [{"id": 1, "name": "thing"}],
            "annotations": [box, {**box, "image_id": 4, "iscrowd": 1}],
        }
        with pytest.raises(DatasetError, match=r"None of the 2 images to (search|judge).*--seed"):
            split_images(ids, ImageMatcher(content, [1]), 0)


class TestPath:
    def test_all_images_judge_it(self, recorded, calibrator):
        assert calibrator.others.recording.image_ids == recorded[0].image_ids
        assert calibrator.sequence.settings[0] == calibrator.plain[0] == {}
        tried = [calibrator.search.setting(levels) for levels in calibrator.search.tried]
        assert tried == calibrator.sequence.settings

    @pytest.mark.parametrize("which", [0, 1])
    @pytest.mark.parametrize("num_stages", [2, 3, 4])
    def test_it_leads_from_safe_to_risky(self, num_stages, which):
        path, drops = exit_paths(num_stages=num_stages, proposals_per_image=300)[which]
        assert path[0] == {}
        assert drops[0] == 0
        assert drops == sorted(drops)
        assert len(drops) == len(path)
        for before, after in itertools.pairwise(path[1:]):
            assert after["PRUNE_THRESHOLDS"] >= before["PRUNE_THRESHOLDS"]
            assert after.get("REDUNDANCY_IOU", 2) <= before.get("REDUNDANCY_IOU", 2)
            budgets = [
                [n or 10**6 for n in one.get("REGION_BUDGET", (0,) * num_stages)]
                for one in (before, after)
            ]
            assert all(map(int.__ge__, *budgets))
            assert after != before
        for setting in path:
            policy = build_policy(_cfg(num_stages), setting, None)
            assert policy.num_stages == num_stages

    @pytest.mark.parametrize("which", [0, 1])
    def test_a_budget_that_no_image_reaches_is_none(self, which):
        few, _ = exit_paths(num_stages=3, proposals_per_image=35)[which]
        limits = {n for setting in few for n in setting.get("REGION_BUDGET", ())}
        assert limits <= {0, *range(35)}
        assert [json.dumps(setting) for setting in few] == list(
            dict.fromkeys(json.dumps(setting) for setting in few)
        )

    @pytest.mark.parametrize("which", [0, 1])
    def test_it_is_the_one_along_which_ap_changes_little(self, recorded, monkeypatch, which):
        """Made-up deviations: 9 points wherever only the other path goes."""
        paths = exit_paths(num_stages=3, proposals_per_image=recorded[0].most_proposals)
        own, other = paths[which][0], paths[1 - which][0]
        monkeypatch.setattr(
            Evidence,
            "deviation",
            lambda _, setting: 9.0 * (setting in other and setting not in own),
        )
        calibrator = make_calibrator(*recorded)
        calibrator.choose_path(Target(max_ap_drop=1.0))
        assert calibrator.plain == calibrator.sequence.settings == own
        assert calibrator.sequence.scales == paths[which][1]

    @pytest.mark.parametrize("target", [Target(risk=0.1), Target(max_ap_drop=0.1)])
    def test_images_choose_no_path_of_a_guarantee(self, recorded, monkeypatch, target):
        """The deviation of AP would choose the second path."""
        paths = exit_paths(num_stages=3, proposals_per_image=recorded[0].most_proposals)
        (first, _), (second, _) = paths
        monkeypatch.setattr(Evidence, "deviation", lambda _, one: 9.0 * (one not in second))
        calibrator = make_calibrator(*recorded)
        calibrator.choose_path(target)
        assert calibrator.sequence.settings == (second if target.risk is None else first)


class TestFreeSearch:
    def test_the_same_seed_finds_the_same(self, recorded, searched):
        again = make_calibrator(*recorded, tries=60)
        assert list(again.search.tried) == list(searched.search.tried)
        target = Target(exit_rate=0.4)
        assert again.calibrate(target).setting == searched.calibrate(target).setting
        other = make_calibrator(*recorded, seed=1, tries=1)
        assert other.trials.recording.image_ids != searched.trials.recording.image_ids

    def test_the_other_half_has_no_say_in_what_it_judges(self, recorded, searched):
        recording, matcher = recorded
        _, reporting = split_images(recording.image_ids, matcher, 0)
        nonsense = make_calibrator(_nonsense(recording, reporting), matcher, tries=60)
        assert list(nonsense.search.tried) == list(searched.search.tried)
        assert nonsense.sequence.settings == searched.sequence.settings

    def test_it_judges_what_nothing_beats(self, searched):
        search = searched.search
        full = search.tried[search.full]
        found = {
            str(search.setting(levels)): (loss_of(trial, full), trial.work)
            for levels, trial in search.tried.items()
        }
        judged = [found[str(setting)] for setting in searched.plain[1:]]
        assert searched.plain[0] == {}
        assert len(judged) > 3
        assert judged == sorted(judged)
        others = [outcome for name, outcome in found.items() if name != "{}"]
        for loss, work in judged:
            assert not any((a <= loss and b < work) or (a < loss and b <= work) for a, b in others)


class TestChoice:
    @pytest.fixture(params=["calibrator", "searched"])
    def either(self, request):
        return request.getfixturevalue(request.param)

    def test_it_is_measured_on_the_images_that_judge(self, either):
        found = either.calibrate(Target(exit_rate=0.4))
        wanted = either.others.replay(either.policy(found.setting))
        assert found.reported.metrics == wanted.metrics
        assert found.full is either.others.full
        assert found.differences.keys() == wanted.metrics.keys()

    @pytest.mark.parametrize("most", [0.0, 10.0, 40.0])
    def test_the_riskiest_whose_drop_is_sure(self, either, most):
        found = either.calibrate(Target(max_ap_drop=most))
        place = either.sequence.within(most).place
        assert found.setting == either.sequence.settings[place]

    @pytest.mark.parametrize(
        "target",
        [
            *({"latency_ms": milliseconds} for milliseconds in (12.0, 14.0, 100.0)),
            *({"exit_rate": rate} for rate in (0.0, 0.3, 0.6)),
        ],
    )
    def test_the_safest_that_reaches_the_target(self, either, target):
        def is_reached(trial):
            if "latency_ms" in target:
                return LATENCY.per_image(trial.entered) <= target["latency_ms"]
            skipped = 1 - trial.entered[1:].sum() / either.others.full.entered[1:].sum()
            return skipped >= target["exit_rate"]

        found = either.calibrate(Target(**target), LATENCY)
        trials = [either.others.replay(either.policy(s)) for s in either.sequence.settings]
        first = next(place for place, trial in enumerate(trials) if is_reached(trial))
        assert found.setting == either.sequence.settings[first]

    @pytest.mark.parametrize(
        ("step", "is_taken"),
        [
            ({"GATES_OFF": ()}, True),  # changes nothing
            ({"REGION_BUDGET": (2, 2, 2)}, False),  # loses objects
            (NOTHING_LEAVES, False),
        ],
    )
    def test_a_rate_takes_the_tile_gate_where_it_costs_no_ap(
        self, recorded, monkeypatch, step, is_taken
    ):
        """Another exit, said to save time, in the place of a tile threshold."""
        monkeypatch.setattr(f"{Calibrator.__module__}.tile_steps", lambda _: ([{}, step], [0, 0]))
        made = make_calibrator(*recorded)
        monkeypatch.setattr(
            "cascade_det.calibration.choose.time_by",
            lambda *_: lambda setting: 2.0 - (step.items() <= setting.items()),
        )
        latency = dataclasses.replace(LATENCY, per_tile=(1.0, 1.0, 1.0, 1.0))
        found = made.calibrate(Target(exit_rate=0.3), latency)
        alone = made.calibrate(Target(exit_rate=0.3))
        assert found.choice.place == alone.choice.place
        assert found.choice.tile == is_taken
        assert found.reported.exit_rate(found.full) >= 0.3

    @pytest.mark.parametrize("saves", [True, False])
    def test_a_guarantee_has_tile_gates_where_they_save_time(self, recorded, monkeypatch, saves):
        """Another exit in the place of a tile threshold."""
        step = {"PROPOSAL_THRESHOLD": 1e-6}
        monkeypatch.setattr(f"{Calibrator.__module__}.tile_steps", lambda _: ([{}, step], [0, 0]))
        monkeypatch.setattr(
            "cascade_det.calibration.choose.time_by",
            lambda *_: lambda setting: 2.0 - saves * (step.items() <= setting.items()),
        )
        latency = dataclasses.replace(LATENCY, per_tile=(1.0, 1.0, 1.0, 1.0))
        found = make_calibrator(*recorded).calibrate(Target(risk=0.9, delta=0.5), latency)
        assert found.choice.place > 0
        assert found.choice.tile == saves

    def test_what_no_setting_reaches(self, calibrator):
        with pytest.raises(ConfigError, match=r"--latency-ms 4\.0: the fastest setting takes \d"):
            calibrator.calibrate(Target(latency_ms=4.0), LATENCY)
        with pytest.raises(ConfigError, match=r"--exit-rate 1\.0: the most that a setting skips"):
            calibrator.calibrate(Target(exit_rate=1.0))

    @pytest.mark.parametrize("tries", [0, 200])
    def test_where_exits_only_hurt_nothing_leaves(self, tries):
        recording, matcher = _misleading()
        calibrator = make_calibrator(recording, matcher, tries=tries)
        full = calibrator.others.full
        assert full.metrics["AP"] > 50
        for target in ({"max_ap_drop": 0.0}, {"exit_rate": 0.0}, {"latency_ms": 1e6}):
            found = calibrator.calibrate(Target(**target), LATENCY)
            assert found.setting == found.plain == {}
            assert found.reported.work == 1


class TestGuarantee:
    @pytest.mark.parametrize("name", ["calibrator", "searched"])
    def test_it_is_a_fixed_sequence_of_tests(self, request, name):
        calibrator = request.getfixturevalue(name)
        settings = calibrator.sequence.settings
        losses = [calibrator.others.replay(calibrator.policy(s)).lost for s in settings]
        chosen = []
        for risk, delta in ((0.02, 0.8), (0.1, 0.4), (0.35, 0.2), (0.65, 0.4), (0.9, 0.4)):
            passed = [hoeffding_bentkus_p_value(own, risk) <= delta for own in losses]
            wanted = max(passed.index(False) - 1, 0) if False in passed else len(passed) - 1
            found = calibrator.calibrate(Target(risk=risk, delta=delta))
            assert found.setting == settings[wanted]
            chosen.append(wanted)
        assert len(set(chosen)) > 1

    def test_it_holds_at_its_rate(self):
        """Settings whose risk is known: of many calibrations few choose one that is too risky."""
        generator = np.random.default_rng(0)
        risks = np.array([0.0, 0.1, 0.18, 0.22, 0.3, 0.25])
        too_risky, chosen = 0, []
        for _ in range(300):
            losses = generator.uniform(size=(6, 40)) < risks[:, None]
            chosen.append(fixed_sequence(losses * 1.0, 0.2, 0.2))
            too_risky += risks[chosen[-1]] > 0.2
        # 0.2 of 300 is 60, and 80 is three standard deviations more.
        assert too_risky <= 80
        assert set(chosen) >= {0, 1, 2}


def test_learned_parts_are_copied_to_the_cpu_and_used(recorded):
    parts = make_parts(hidden=HIDDEN, crop_channels=CROP_CHANNELS).train()
    calibrator = make_calibrator(*recorded, learned=parts, tries=1)
    setting = {"PRUNER_THRESHOLDS": (0.0, 0.5, 0.5)}
    with pytest.raises(ValueError, match="pruner"):
        build_policy(calibrator.cfg, setting, None)
    trial = calibrator.trials.replay(calibrator.policy(setting))
    assert trial.work < 1
    assert parts.training
    with torch.no_grad():
        for parameter in parts.parameters():
            parameter.zero_()
    assert calibrator.trials.replay(calibrator.policy(setting)).work == trial.work
    assert {"pruner at gate 0", "acceptance"} <= calibrator.search.parameters.keys()


def test_a_policy_is_what_its_setting_says():
    cfg = get_cfg()
    cfg.MODEL.CASCADE.EXIT.ENABLED = True
    cfg.MODEL.CASCADE.EXIT.REGION_BUDGET = (10,)
    cfg.MODEL.CASCADE.EXIT.TIME_BUDGET_MS = 5.0
    assert build_policy(cfg, {}, None).rules == ()
    policy = build_policy(cfg, {"REDUNDANCY_IOU": 0.7, "SCORE_SCALES": (0.5, 1.0, 1.0)}, None)
    assert [rule.reason for rule in policy.rules] == ["redundant"]
    assert policy.score_scales == (0.5, 1.0, 1.0)
    assert policy.time_budget is None
    assert list(cfg.MODEL.CASCADE.EXIT.REGION_BUDGET) == [10]


def _cfg(num_stages):
    cfg = get_cfg()
    ious = tuple(0.4 + 0.1 * stage for stage in range(num_stages))
    cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS = ious
    cfg.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS = ((10.0, 10.0, 5.0, 5.0),) * num_stages
    return cfg


def _nonsense(recording, images):
    """The recording with random classes in these images."""
    records = []
    for place in range(len(recording.image_ids)):
        alone = recording.of_images([place]).records[0]
        if place in images:
            stages = [
                dataclasses.replace(
                    stage, score_state=stage.score_state[torch.randperm(len(stage.score_state))]
                )
                for stage in alone.stages
            ]
            alone = dataclasses.replace(alone, stages=stages)
        records.append(alone)
    return dataclasses.replace(recording, records=records)


def _misleading():
    """Until the last stage, objects look like background, lie in one place, and rank last."""
    trials = make_trials(seeds=range(4), num_proposals=(20, 20), num_objects=(4, 4))
    records = []
    for record, first in zip(trials.recording.records, range(0, 8, 2), strict=True):
        probs = torch.full((40, 4), 0.05)
        probs[:, 3] = 0.85
        last, early = probs.clone(), probs.clone()
        boxes = record.stages[-1].boxes.clone()
        is_object = torch.zeros(40, dtype=torch.bool)
        for image in range(2):
            gt_boxes, gt_classes = trials.matcher.objects_of(10 + first + image)
            rows = 20 * image + torch.arange(len(gt_boxes))
            is_object[rows] = True
            boxes[rows] = torch.from_numpy(gt_boxes).float() / 2
            last[rows] = torch.eye(4)[torch.from_numpy(gt_classes)] * 0.9 + 0.025
        early[is_object] = torch.tensor([2e-4, 1e-4, 1e-4, 0.9996])
        early[~is_object] = torch.tensor([0.97, 0.01, 0.01, 0.01])
        place = torch.tensor([[5.0, 5.0, 60.0, 60.0]]).expand(40, 4)
        stages = [
            dataclasses.replace(
                stage,
                boxes=boxes if final else place,
                decoded=boxes if final else place,
                score_state=3 * last if final else early * count,
            )
            for stage, count, final in zip(record.stages, (1, 2, 3), (0, 0, 1), strict=True)
        ]
        objectness = torch.where(is_object, -5.0, 5.0) + 0.01 * torch.arange(40)
        records.append(dataclasses.replace(record, stages=stages, objectness=objectness))
    recording = Recording(
        records, trials.recording.image_ids, trials.recording.frames, trials.recording.stage_flops
    )
    return recording, trials.matcher

"""From a target to a setting: on which images, by which rule, with which promise."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from random_records import CROP_CHANNELS, HIDDEN, make_parts
from recorded_trials import make_calibrator, make_trials

from cascade_det.calibration.bootstrap import paired_bootstrap
from cascade_det.calibration.calibrator import (
    Calibrator,
    build_policy,
    split_images,
)
from cascade_det.calibration.image_matching import ImageMatcher
from cascade_det.calibration.latency_model import LatencyModel
from cascade_det.calibration.risk_control import (
    hoeffding_bentkus_p_value,
)
from cascade_det.calibration.search import Search
from cascade_det.calibration.target import Target
from cascade_det.calibration.trials import Recording, TrialSummary
from cascade_det.config import get_cfg
from cascade_det.errors import ConfigError, DatasetError

LATENCY = LatencyModel(5.0, (1.0, 1.0, 1.0), (0.1, 0.1, 0.1), "some CPU", 1, 99, 0.0)


@pytest.fixture(scope="module")
def recorded():
    """Twelve images, in records of two."""
    trials = make_trials(seeds=range(6))
    return trials.recording, trials.matcher


@pytest.fixture(scope="module")
def calibrator(recorded):
    return make_calibrator(*recorded)


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

    def test_they_are_those_of_the_trials(self, recorded, calibrator):
        ids = np.array(recorded[0].image_ids)
        choosing, reporting = split_images(recorded[0].image_ids, recorded[1], 0)
        assert calibrator.trials.recording.image_ids == ids[choosing].tolist()
        assert calibrator.others.recording.image_ids == ids[reporting].tolist()

    def test_one_without_an_object(self):
        ids = [1, 2, 3, 4]
        box = {"image_id": 3, "category_id": 1, "bbox": [1, 1, 5, 5]}
        content = {
            "images": [{"id": i, "height": 50, "width": 50} for i in ids],
            "categories": [{"id": 1, "name": "thing"}],
            "annotations": [box, {**box, "image_id": 4, "iscrowd": 1}],
        }
        with pytest.raises(DatasetError, match=r"None of the 2 images to (choose|judge).*--seed"):
            split_images(ids, ImageMatcher(content, [1]), 0)


class TestChoice:
    def test_the_same_seed_finds_the_same(self, recorded, calibrator):
        again = make_calibrator(*recorded)
        assert list(again.search.tried) == list(calibrator.search.tried)
        target = Target(exit_rate=0.4)
        assert again.calibrate(target).setting == calibrator.calibrate(target).setting
        other = make_calibrator(*recorded, seed=1)
        assert other.trials.recording.image_ids != calibrator.trials.recording.image_ids

    @pytest.mark.parametrize(
        "target", [{"max_ap_drop": 5.0}, {"latency_ms": 11.0}, {"exit_rate": 0.5}]
    )
    def test_the_other_half_has_no_say(self, recorded, calibrator, target):
        recording, matcher = recorded
        _, reporting = split_images(recording.image_ids, matcher, 0)
        nonsense = make_calibrator(_nonsense(recording, reporting), matcher)
        assert list(nonsense.search.tried) == list(calibrator.search.tried)
        ours = calibrator.calibrate(Target(**target), LATENCY)
        theirs = nonsense.calibrate(Target(**target), LATENCY)
        # But for a veto where the drop is larger there.
        ours, theirs = (found.rejected or found for found in (ours, theirs))
        assert ours.setting
        assert ours.setting == theirs.setting
        assert ours.reported.metrics != theirs.reported.metrics

    def test_a_drop_that_the_other_half_does_not_have_is_no_promise(self, calibrator):
        vetoed = []
        for most in np.linspace(0, 40, 9):
            found = calibrator.calibrate(Target(max_ap_drop=float(most)))
            first = found.rejected or found
            drop = found.full.metrics["AP"] - first.reported.metrics["AP"]
            assert first.drop == pytest.approx(drop)
            assert (found.rejected is not None) == (drop > most)
            if found.rejected is not None:
                assert (found.setting, found.plain, found.drop) == ({}, {}, 0)
                assert found.reported.work == 1
                vetoed.append(first.setting)
        # Both happen on these images.
        assert 0 < len(vetoed) < 9
        assert all(vetoed)

    def test_it_is_reported_on_the_other_half(self, calibrator):
        found = calibrator.calibrate(Target(exit_rate=0.4))
        wanted = calibrator.others.replay(calibrator.policy(found.setting))
        assert found.reported.metrics == wanted.metrics
        assert found.full is calibrator.others.full
        change = wanted.metrics["AP"] - found.full.metrics["AP"]
        assert found.differences["AP"].value == pytest.approx(change)

    @pytest.mark.parametrize("most", [0.0, 10.0, 40.0])
    def test_the_least_work_within_a_drop_that_is_sure(self, calibrator, most):
        def is_good(levels):
            policy = calibrator.policy(calibrator.search.setting(levels))
            full, trial = calibrator.trials.full, calibrator.trials.replay(policy)
            assert trial.work == calibrator.search.tried[levels].work
            change = paired_bootstrap(full.matched, trial.matched, rounds=300)["AP"]
            return change.value >= -most and change.deviation - change.value <= most

        found = calibrator.calibrate(Target(max_ap_drop=most))
        chosen = calibrator.trials.replay(calibrator.policy((found.rejected or found).plain))
        good = [t.work for levels, t in calibrator.search.tried.items() if is_good(levels)]
        assert chosen.work == min(good)

    @pytest.mark.parametrize(
        "target",
        [
            *({"latency_ms": milliseconds} for milliseconds in (9.0, 11.0, 100.0)),
            *({"exit_rate": rate} for rate in (0.0, 0.3, 0.6)),
        ],
    )
    def test_the_highest_ap_that_reaches_the_target(self, calibrator, target):
        def is_reached(trial):
            if "latency_ms" in target:
                return LATENCY.per_image(trial.entered) <= target["latency_ms"]
            skipped = 1 - trial.entered[1:].sum() / calibrator.trials.full.entered[1:].sum()
            return skipped >= target["exit_rate"]

        found = calibrator.calibrate(Target(**target), LATENCY)
        chosen = calibrator.trials.replay(calibrator.policy(found.plain))
        reached = [trial for trial in calibrator.search.tried.values() if is_reached(trial)]
        assert is_reached(chosen)
        assert chosen.metrics["AP"] == max(trial.metrics["AP"] for trial in reached)

    def test_what_no_setting_reaches(self, calibrator):
        with pytest.raises(ConfigError, match=r"--latency-ms 4\.0: the fastest setting takes \d"):
            calibrator.calibrate(Target(latency_ms=4.0), LATENCY)
        with pytest.raises(ConfigError, match=r"--exit-rate 1\.0: the most that a setting skips"):
            calibrator.calibrate(Target(exit_rate=1.0))

    def test_where_exits_only_hurt_nothing_leaves(self):
        recording, matcher = _misleading()
        calibrator = make_calibrator(recording, matcher, tries=200)
        full = calibrator.trials.full
        assert full.metrics["AP"] > 50
        others = [trial for levels, trial in calibrator.search.tried.items() if any(levels)]
        assert all(trial.metrics["AP"] < full.metrics["AP"] for trial in others)
        for target in ({"max_ap_drop": 0.0}, {"exit_rate": 0.0}, {"latency_ms": 1e6}):
            found = calibrator.calibrate(Target(**target), LATENCY)
            assert found.setting == found.plain == {}
            assert found.reported.work == 1


def by_pareto_testing(risks, work, losses, risk, delta):
    """The last setting of the front, by rising risk, before the first one that fails its test."""
    front, cheapest = [], np.inf
    for _, cost, index in sorted(zip(risks, work, range(len(work)), strict=True)):
        if cost < cheapest:
            front.append(index)
            cheapest = cost
    chosen = 0
    for index in front:
        if hoeffding_bentkus_p_value(losses[index], risk) > delta:
            break
        chosen = index
    return chosen


class TestGuarantee:
    def test_it_is_pareto_testing_of_all_that_was_tried(self, calibrator):
        keys = list(calibrator.search.tried)
        settings = [calibrator.search.setting(key) for key in keys]
        work = [calibrator.search.tried[key].work for key in keys]
        risks = [calibrator.search.tried[key].lost.mean() for key in keys]
        losses = [
            calibrator.others.replay(calibrator.policy(calibrator.with_scores(setting))).lost
            for setting in settings
        ]
        chosen = []
        for risk, delta in ((0.35, 0.2), (0.5, 0.3), (0.65, 0.4), (0.9, 0.4)):
            wanted = by_pareto_testing(risks, work, losses, risk, delta)
            found = calibrator.calibrate(Target(risk=risk, delta=delta))
            assert found.plain == settings[wanted]
            assert found.setting == calibrator.with_scores(found.plain)
            chosen.append(work[wanted])
        assert len(set(chosen)) > 1

    def test_the_map_of_the_scores_is_tested_too(self, recorded, monkeypatch):
        """Scores that become 0 lose everything: no setting with such a map may pass."""
        calibrator = make_calibrator(*recorded, tries=8)
        gone = {"SCORE_SCALES": (1.0, 1.0, 1.0), "SCORE_SHIFTS": (-20.0, -20.0, -20.0)}
        monkeypatch.setattr(
            calibrator, "with_scores", lambda setting: {**setting, **gone} if setting else setting
        )
        found = calibrator.calibrate(Target(risk=0.35, delta=0.2))
        assert found.setting == {}

    def test_it_holds_at_its_rate(self):
        """Settings whose risk is known: of many calibrations few choose one that is too risky."""
        generator = np.random.default_rng(0)
        risks = np.array([0.0, 0.1, 0.18, 0.22, 0.3, 0.25])
        work = [1.0, 0.6, 0.5, 0.4, 0.3, 0.35]
        too_risky, chosen = 0, []
        for _ in range(300):
            losses = generator.uniform(size=(6, 80)) < risks[:, None]
            simulated = _Simulated(losses * 1.0, work, range(40), range(40, 80))
            chosen.append(simulated.calibrate(Target(risk=0.2, delta=0.2)))
            too_risky += risks[chosen[-1]] > 0.2
        # 0.2 of 300 is 60, and 80 is three standard deviations more.
        assert too_risky <= 80
        assert set(chosen) >= {0, 1, 2}
        assert too_risky > 0 or set(chosen) <= {0, 1, 2}


class _Simulated(Calibrator):
    """Settings whose losses are given; setting 0 is the full cascade."""

    def __init__(self, losses, work, choosing, testing):
        choosing, testing = list(choosing), list(testing)

        def outcome(row, images):
            empty, none = np.zeros((3, len(images)), np.int64), np.zeros(len(images), np.int64)
            lost = losses[row][images]
            return TrialSummary({"AP": 0.0}, empty, lost, lost, work[row], none)

        parameters = {"row": [{"row": row} for row in range(len(work))]}
        self.search = Search(parameters, lambda setting: outcome(setting["row"], choosing))
        for row in range(len(work)):
            self.search.trial([row])
        self.others = SimpleNamespace(replay=lambda row: outcome(row, testing))

    def policy(self, setting):
        return setting["row"]

    def with_scores(self, setting):
        return setting

    def calibrate(self, target):
        (level,) = self._choose(target, None)
        return level


def test_learned_parts_are_copied_to_the_cpu_and_used(recorded):
    parts = make_parts(hidden=HIDDEN, crop_channels=CROP_CHANNELS).train()
    calibrator = make_calibrator(*recorded, learned=parts, tries=0)
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

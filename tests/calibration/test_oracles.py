"""Exits at random, and oracles: what they drop is not missed, what they accept is settled."""

import dataclasses
from itertools import chain

import numpy as np
import pytest
import torch
from naive_exits import iou
from random_records import make_recorded_scene
from recorded_trials import FRAME, SCALE, make_trials, settled_record, without_stages
from small_cascades import assert_same_detections

from cascade_det.calibration.oracles import (
    ExitAfter,
    drop_oracle,
    outcome_oracle,
    random_exits,
)
from cascade_det.core.exits import RegionView

SHARES = (0.8, 0.5, 0.2)


def objects_of(scene):
    """In the frames of the original images, as a matcher has them."""
    pairs = zip(*scene.targets, strict=True)
    return [(SCALE * boxes.double().numpy(), classes.numpy()) for boxes, classes in pairs]


def exit_stages(record, policy):
    """After which stage each region is reported; -1 for those that are dropped."""
    stages = torch.full((len(record.proposals),), -1)
    for scored in record.replay(policy).reported:
        stages[scored.proposal_index] = scored.exit_stages
    return stages.tolist()


def test_every_region_leaves_after_its_own_stage():
    rule = ExitAfter("background", torch.tensor([1, 0, 2, -1, 0]))
    view = RegionView(
        stage=0,
        num_images=1,
        image_index=torch.zeros(3, dtype=torch.int64),
        boxes=torch.zeros(3, 4),
        objectness=torch.zeros(3),
        proposal_index=torch.tensor([0, 1, 4]),
    )
    assert rule.exit_mask(view).tolist() == [False, True, True]
    assert rule.is_active(-1)
    late = ExitAfter("background", torch.tensor([1, 2]))
    assert [late.is_active(stage) for stage in (-1, 0, 1)] == [False, False, True]


class TestRandomExits:
    @pytest.mark.parametrize("accept", [False, True])
    def test_as_many_enter_each_stage_as_wanted(self, accept):
        record = make_recorded_scene(num_proposals=(60, 40)).record
        replay = record.replay(random_exits(record, SHARES, accept=accept))
        assert replay.entered.sum(dim=1).tolist() == [80, 50, 20]
        reported = sum(len(scored.proposal_index) for scored in replay.reported)
        # What enters stage 0 is reported where it is accepted, what ends the cascade always.
        assert reported == (80 if accept else 20)

    def test_full_shares_are_the_full_cascade(self):
        record = make_recorded_scene().record
        replay = record.replay(random_exits(record, (1.0, 1.0, 1.0), accept=True))
        assert_same_detections(
            record.select(replay.reported), record.select(record.replay(None).reported), exact=True
        )

    def test_nothing_enters(self):
        record = make_recorded_scene().record
        replay = record.replay(random_exits(record, (0.0,) * 3, accept=True))
        assert replay.entered.sum() == 0
        empty = make_recorded_scene(num_proposals=(0, 0)).record
        assert empty.replay(random_exits(empty, SHARES, accept=True)).entered.sum() == 0

    def test_the_same_record_has_the_same_random_order(self):
        record, other = (make_recorded_scene(seed=seed).record for seed in (0, 1))

        def chosen(record):
            return exit_stages(record, random_exits(record, SHARES, accept=True))

        assert chosen(record) == chosen(record)
        assert chosen(record) != chosen(other)


class TestDropOracle:
    @pytest.mark.parametrize("before_stages", [False, True])
    @pytest.mark.parametrize("cls_agnostic", [True, False])
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_it_changes_nothing(self, seed, cls_agnostic, before_stages):
        trials = make_trials(
            seeds=(seed, seed + 10), num_proposals=(60, 50), cls_agnostic=cls_agnostic
        )
        records = trials.recording.records
        policies = [drop_oracle(record, before_stages=before_stages) for record in records]
        assert_same_detections(trials.detections(policies), trials.detections(None), exact=True)
        trial = trials.replay(policies)
        assert trial.metrics == trials.full.metrics
        assert not trial.lost.any()
        first = 0 if before_stages else 1
        assert (trial.entered[:first] == trials.full.entered[:first]).all()
        entered = trial.entered[first:]
        assert (entered == entered[0]).all()
        # At most as many as there are detections, each of which comes from one region.
        found = np.array([len(detections) for detections in trials.detections(None)])
        assert (entered[0] <= found).all()
        assert (entered[0] < trials.full.entered[0]).any()

    def test_every_region_that_is_left_is_needed(self):
        record = make_recorded_scene().record
        oracle = drop_oracle(record)
        dropped = oracle.rules[0].stages

        def scores():
            return [d.scores.tolist() for d in record.select(record.replay(oracle).reported)]

        wanted = scores()
        for row in torch.nonzero(dropped > 0).squeeze(1).tolist():
            oracle.rules[0].stages = dropped.index_fill(0, torch.tensor([row]), 0)
            assert scores() != wanted

    def test_of_no_regions(self):
        record = make_recorded_scene(num_proposals=(0, 0)).record
        assert record.replay(drop_oracle(record)).entered.sum() == 0


def naive_outcome(scene, stage, row, index):
    """Top class, and the IoU thresholds that the box of class ``index`` passes."""
    record = scene.record
    probs = (record.stages[stage].score_state[row] / (stage + 1)).tolist()[:-1]
    boxes = record.stages[stage].decoded[row].reshape(-1, 4)
    box = boxes[index if len(boxes) > 1 else 0].tolist()
    image = record.image_index[row].item()
    objects, classes = scene.gt_boxes[image].tolist(), scene.gt_classes[image].tolist()
    overlaps = [iou(box, o) for o, c in zip(objects, classes, strict=True) if c == index]
    best = max(overlaps, default=0.0)
    return probs.index(max(probs)), sum(best >= (50 + 5 * i) / 100 for i in range(10))


class TestOutcomeOracle:
    @pytest.mark.parametrize("cls_agnostic", [True, False])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_what_leaves_when_by_hand(self, seed, cls_agnostic):
        scene = make_recorded_scene(
            seed=seed, num_proposals=(60, 50), num_objects=(4, 0), cls_agnostic=cls_agnostic
        )
        record = scene.record
        full = record.replay(None).reported[0]
        rows = full.proposal_index[torch.argsort(full.proposal_index)]
        assert rows.tolist() == list(range(110))
        by_row = dataclasses.replace(full, exit_stages=full.proposal_index)
        wanted = [-1] * 110
        for detections in record.select([by_row]):
            pairs = zip(detections.exit_stages.tolist(), detections.classes.tolist(), strict=True)
            for row, index in pairs:
                outcomes = [naive_outcome(scene, stage, row, index) for stage in range(3)]
                since = next(s for s in range(3) if len(set(outcomes[s:])) == 1)
                wanted[row] = max(wanted[row], since)
        oracle = outcome_oracle(record, objects_of(scene), [FRAME] * 2)
        assert exit_stages(record, oracle) == wanted
        assert {-1, 0, 1, 2} == set(wanted), "the scene is too simple"

    @pytest.mark.parametrize("before_stages", [False, True])
    def test_all_leave_after_the_first_stage_where_nothing_changes(self, before_stages):
        scene = make_recorded_scene()
        record = settled_record(scene.record)
        oracle = outcome_oracle(record, objects_of(scene), [FRAME] * 2, before_stages=before_stages)
        replay = record.replay(oracle)
        carriers = len(set(chain(*(s.proposal_index.tolist() for s in replay.reported))))
        count = len(record.proposals)
        assert carriers < count
        wanted = [carriers if before_stages else count, 0, 0]
        assert replay.entered.sum(dim=1).tolist() == wanted
        assert_same_detections(
            without_stages(record.select(replay.reported)),
            without_stages(record.select(record.replay(None).reported)),
        )

    def test_of_no_regions(self):
        scene = make_recorded_scene(num_proposals=(0, 0), num_objects=(2, 0))
        oracle = outcome_oracle(scene.record, objects_of(scene), [FRAME] * 2)
        assert scene.record.replay(oracle).entered.sum() == 0


def test_policies_of_other_records_are_refused():
    trials = make_trials()
    policies = [drop_oracle(record) for record in trials.recording.records]
    with pytest.raises(ValueError, match="shorter"):
        trials.replay(policies[:1])

"""Trials of exits: which images, what they find, what they lose and what they compute."""

import dataclasses

import numpy as np
import pytest
from random_records import make_recorded_scene
from recorded_trials import FRAME, STAGE_FLOPS, make_trials

from cascade_det.calibration.bootstrap import average_precision, average_precisions
from cascade_det.calibration.found_objects import found_objects, lost_shares
from cascade_det.calibration.image_matching import join_images
from cascade_det.calibration.search_space import truncated_cascades
from cascade_det.calibration.trials import ExitTrials, Recording, TrialSummary
from cascade_det.core.exits import ExitPolicy
from cascade_det.core.postprocess import rescale_detections

PRUNING = {"prune_thresholds": (0.7, 0.75), "redundancy_iou": 0.7}
ACCEPTING = {"thresholds": (0.6, 0.5), "region_budget": (0, 20, 10)}


@pytest.fixture(scope="module")
def trials():
    return make_trials(seeds=(3, 4, 5))


def policy(**rules):
    return ExitPolicy(num_stages=3, **rules)


def replayed(trials, exits):
    """What each image gives by itself, in pixels of the original images."""
    found, entered = [], []
    for record in trials.recording.records:
        for image in range(record.num_images):
            alone = record.select_images([image])
            replay = alone.replay(exits)
            found += rescale_detections(alone.select(replay.reported), [FRAME])
            entered.append(replay.entered[:, 0].numpy())
    return found, np.array(entered).T


class TestTrial:
    @pytest.mark.parametrize("rules", [PRUNING, ACCEPTING])
    def test_it_is_what_each_image_gives_by_itself(self, trials, rules):
        exits, matcher, ids = policy(**rules), trials.matcher, trials.recording.image_ids
        trial = trials.replay(exits)
        found, entered = replayed(trials, exits)
        full, _ = replayed(trials, None)
        assert trial.entered.tolist() == entered.tolist()
        flops = (entered.T * STAGE_FLOPS).sum() / (sum(STAGE_FLOPS) * entered[0].sum())
        assert trial.work == pytest.approx(flops)
        matched = join_images(
            matcher.match(image_id, detections)
            for image_id, detections in zip(ids, found, strict=True)
        )
        assert trial.metrics == average_precision(matched)
        np.testing.assert_array_equal(trial.matched.scores, matched.scores)
        wanted = [
            lost_shares(
                *(
                    found_objects(one, *matcher.objects_of(image_id), score=0.3)
                    for one in (before, after)
                )
            )
            for before, after, image_id in zip(full, found, ids, strict=True)
        ]
        assert np.array_equal(np.array(wanted).T, [trial.lost, trial.lost_well_placed])
        assert 0 < trial.lost.sum() < 6
        assert 0 < trial.lost_well_placed.sum() < 6

    def test_the_full_cascade_loses_nothing(self, trials):
        full = trials.full
        assert full.work == 1
        assert not full.lost.any()
        assert not full.lost_well_placed.any()
        assert full.entered.tolist() == [[30, 20] * 3] * 3
        assert (full.regions_left(full), full.exit_rate(full)) == (1, 0)
        assert trials.replay(policy()).metrics == full.metrics
        assert full.metrics["AP"] > 1

    def test_a_cascade_that_stops_early(self, trials):
        one = trials.replay(truncated_cascades(3)["1 stage"])
        assert one.entered.tolist() == [[30, 20] * 3, [0] * 6, [0] * 6]
        assert one.work == pytest.approx(STAGE_FLOPS[0] / sum(STAGE_FLOPS))
        assert (one.regions_left(trials.full), one.exit_rate(trials.full)) == (1 / 3, 1)
        found = [d for r in trials.recording.records for d in r.select(r.replay(None, 1).reported)]
        for ours, theirs in zip(
            trials.detections(policy(thresholds=(0.0, 2.0))), found, strict=True
        ):
            assert ours.scores.tolist() == theirs.scores.tolist()

    def test_a_policy_for_each_record(self, trials):
        alike, other = policy(**PRUNING), policy(**ACCEPTING)
        mixed = trials.replay([alike, other, None])
        parts = [trials.replay(exits).entered for exits in (alike, other, None)]
        wanted = np.concatenate([parts[i][:, 2 * i : 2 * i + 2] for i in range(3)], axis=1)
        assert mixed.entered.tolist() == wanted.tolist()

    def test_its_summary_is_small(self, trials):
        trial = trials.replay(policy(**PRUNING))
        summary = trial.summary()
        assert type(summary) is TrialSummary
        for field in dataclasses.fields(TrialSummary):
            assert getattr(summary, field.name) is getattr(trial, field.name)

    def test_detections_are_in_the_original_images(self, trials):
        exits = policy(**PRUNING)
        wanted, _ = replayed(trials, exits)
        for ours, theirs in zip(trials.detections(exits), wanted, strict=True):
            assert ours.boxes.tolist() == theirs.boxes.tolist()
            assert ours.scores.tolist() == theirs.scores.tolist()


class TestRecording:
    def test_some_of_the_images_in_rising_order(self, trials):
        some = trials.recording.of_images([4, 0, 3])
        assert some.image_ids == [10, 13, 14]
        assert len(some.frames) == 3
        assert [record.num_images for record in some.records] == [1, 1, 1]
        exits = policy(**PRUNING)
        part = ExitTrials(some, trials.matcher, score=0.3).replay(exits)
        whole = trials.replay(exits)
        assert part.entered.tolist() == whole.entered[:, [0, 3, 4]].tolist()
        assert part.lost.tolist() == whole.lost[[0, 3, 4]].tolist()
        weights = np.isin(whole.matched.image_ids, [10, 13, 14])
        kept = weights[whole.matched.images]
        assert part.matched.scores.tolist() == whole.matched.scores[kept].tolist()
        of_part = average_precisions(whole.matched, weights[None])
        assert part.metrics == {name: values[0] for name, values in of_part.items()}

    def test_sizes_go_with_their_images(self):
        record = make_recorded_scene(num_proposals=(3, 4, 5), num_objects=(1, 1, 1)).record
        frames = [((10 * i, 20), (i, i)) for i in range(1, 4)]
        some = Recording([record], [7, 8, 9], frames, STAGE_FLOPS).of_images([2, 0])
        assert (some.image_ids, some.frames) == ([7, 9], [frames[0], frames[2]])
        assert some.most_proposals == 5

    def test_the_most_proposals(self, trials):
        assert trials.recording.most_proposals == 30
        none = make_recorded_scene(num_proposals=(0, 0), num_objects=(1, 1)).record
        assert Recording([none], [1, 2], [FRAME] * 2, STAGE_FLOPS).most_proposals == 0


def test_images_without_proposals():
    trials = make_trials(num_proposals=(0, 20))
    trial = trials.replay(policy(**PRUNING))
    assert trial.entered[0].tolist() == [0, 20, 0, 20]
    empty = make_trials(num_proposals=(0, 0))
    trial = empty.replay(policy(proposal_threshold=0.5))
    assert trial.work == trial.metrics["AP"] == 0
    assert not trial.lost.any()

"""The recording of a data set, and the measuring of exits, with a cascade without a backbone."""

import dataclasses

import numpy as np
import pytest
import torch
from random_records import make_parts
from scene_detectors import (
    COSTS,
    MASK_COSTS,
    SIZES,
    SceneDetector,
    batches_of,
    make_masks,
)
from small_cascades import CHANNELS, assert_same_detections, truncate

from cascade_det.calibration.image_matching import ImageMatcher
from cascade_det.calibration.recording import (
    first_batches,
    fit_latency,
    record_dataset,
    time_policies,
)
from cascade_det.calibration.search_space import truncated_cascades
from cascade_det.calibration.trials import ExitTrials
from cascade_det.core.exits import ExitPolicy
from cascade_det.core.record import join_records
from cascade_det.engine.head_flops import region_flops

RULES = {"prune_thresholds": (0.4, 0.5), "thresholds": (0.9, 0.8), "redundancy_iou": 0.7}


def trials_of(detector, recording):
    """Trials of a recording, whose objects are somewhere."""
    images = [{"id": i, "height": 1, "width": 1} for i in recording.image_ids]
    content = {
        "images": images,
        "categories": [{"id": i, "name": str(i)} for i in (1, 2, 3)],
        "annotations": [
            {"image_id": image["id"], "category_id": 1, "bbox": [5, 5, 50, 50]} for image in images
        ],
    }
    return ExitTrials(recording, ImageMatcher(content, [1, 2, 3]), score=0.3)


def tensors_of(record):
    for part in (record, *record.stages):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if isinstance(value, torch.Tensor):
                yield field.name, value


class TestRecording:
    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_it_is_what_the_cascade_records_of_each_batch(self, size):
        detector = SceneDetector()
        batches = batches_of(detector, size)
        recording = record_dataset(detector, batches, 4)
        detector.eval()
        wanted = join_records(
            [detector.cascade.record(**vars(detector.cascade_inputs(b))) for b in batches]
        )
        (record,) = recording.records
        assert [n for n, _ in tensors_of(record)] == [n for n, _ in tensors_of(wanted)]
        for (_, ours), (_, theirs) in zip(tensors_of(record), tensors_of(wanted), strict=True):
            assert torch.equal(ours, theirs)
            assert not ours.requires_grad
        assert recording.image_ids == [10, 11, 12, 13]
        assert recording.frames == [(size, (2 * size[0], 3 * size[1])) for size in SIZES * 2]
        assert recording.stage_flops == region_flops(detector.cascade, CHANNELS).stages

    @pytest.mark.parametrize("most", [1, 2, 3, 4, 9])
    def test_the_first_images_alone(self, most):
        detector, read = SceneDetector(), []
        loader = (read.append(batch) or batch for batch in batches_of(detector, 2))
        recording = record_dataset(detector, loader, most)
        assert recording.image_ids == [10, 11, 12, 13][:most]
        assert sum(record.num_images for record in recording.records) == min(most, 4)
        assert len(read) == min(2, (most + 1) // 2)  # and no batch for nothing

    def test_records_are_joined_into_larger_ones(self):
        detector = SceneDetector(images=40)
        recording = record_dataset(detector, batches_of(detector, 3), 40)
        assert [record.num_images for record in recording.records] == [33, 7]
        assert recording.image_ids == list(range(10, 50))
        (whole,) = [join_records(recording.records)]
        counts = torch.bincount(whole.image_index).tolist()
        assert counts == [20 + i for i in range(40)]

    def test_the_detector_stays_in_its_mode(self):
        detector = SceneDetector()
        detector.dropout.eval()
        record_dataset(detector, batches_of(detector, 2), 4)
        assert detector.training
        assert not detector.dropout.training

    def test_learned_parts_are_recorded_and_used(self):
        parts = make_parts(crop_channels=CHANNELS, hidden=12, seed=2)
        exits = ExitPolicy(num_stages=3, learned=parts)
        detector = SceneDetector(exits=exits)
        recording = record_dataset(detector, batches_of(detector, 2), 4)
        (record,) = recording.records
        assert record.crops.shape == (len(record.proposals), CHANNELS)
        assert all(len(stage.predicted_ious) == len(record.proposals) for stage in record.stages)
        assert len(record.stages[0].predicted_ious.unique()) > 10
        policy = ExitPolicy(
            num_stages=3,
            learned=parts,
            pruner_thresholds=(0.3, 0.2, 0.2),
            confidence="learned",
            thresholds=(0.5, 0.5),
            localisation="predicted_iou",
            localisation_thresholds=(0.3, 0.3),
        )
        same_as_the_run(detector, recording, policy, 2)


def same_as_the_run(detector, recording, policy, size):
    """Replayed detections and counts are those of a detector with these exits."""
    trials = trials_of(detector, recording)
    entered = trials.replay(policy).entered
    detector.eval().set_exits(policy)
    outputs = [detector.detect(batch) for batch in batches_of(detector, size)]
    found = [detections for output in outputs for detections in output.detections]
    assert_same_detections(trials.detections(policy), found)
    counts = np.sum([output.stats.entered for output in outputs], axis=0)
    assert entered.sum(axis=1).tolist() == counts.tolist()
    assert 0 < counts[2] < counts[1] < entered[0].sum() + 1


def test_the_replay_is_the_run_in_batches_of_any_size():
    detector = SceneDetector(images=8)
    for recorded in (1, 8):
        recording = record_dataset(detector, batches_of(detector, recorded), 8)
        for size in (1, 8):
            same_as_the_run(detector, recording, ExitPolicy(num_stages=3, **RULES), size)


class TestTiming:
    def test_one_call_for_each_batch_round_and_policy_in_turn(self):
        detector = SceneDetector()
        own = ExitPolicy(num_stages=3, prune_thresholds=(0.1, 0.1))
        detector.set_exits(own)
        policies = {"full": None, "pruned": ExitPolicy(num_stages=3, **RULES)}
        batches = batches_of(detector, 2)
        timings = time_policies(detector, batches, policies, rounds=2)
        assert {name: len(calls) for name, calls in timings.items()} == {"full": 4, "pruned": 4}
        assert detector.cascade.exits is own
        assert detector.training
        warm, timed = detector.calls[:2], detector.calls[2:]
        assert [(exits, ids, timer) for exits, ids, timer in warm] == [
            (exits, [10, 11], False) for exits in policies.values()
        ]
        ids = [[sample["image_id"] for sample in batch] for batch in batches]
        assert timed == [(e, b, True) for b in ids * 2 for e in policies.values()]
        assert timings["full"][0].entered == (41, 41, 41)
        assert timings["full"][1].entered == (45, 45, 45)
        assert timings["pruned"][0].entered[2] < 41
        for call in timings["pruned"]:
            per_call, per_region = np.array(COSTS)
            stages = per_call * (np.array(call.entered) > 0) + per_region * call.entered
            assert call.milliseconds == pytest.approx(20 + stages.sum())

    def test_its_own_exits_come_back_after_an_error(self):
        detector = SceneDetector()
        own = ExitPolicy(num_stages=3)
        detector.set_exits(own)
        detector.fails = True
        with pytest.raises(RuntimeError, match="out of memory"):
            time_policies(detector, batches_of(detector, 2), {"full": None}, rounds=1)
        assert detector.cascade.exits is own
        assert detector.training

    def test_a_latency_model_of_the_device(self):
        detector = SceneDetector(images=2)
        model = fit_latency(detector, batches_of(detector, 1), most_proposals=24, rounds=1)
        assert (model.batch_size, model.samples) == (1, 24)
        assert model.device_name
        assert model.spread < 1e-6
        for entered in ((40, 12, 3), (41, 0, 0), (8, 8, 0)):
            per_call, per_region = np.array(COSTS)
            wanted = 20 + (per_call * (np.array(entered) > 0) + per_region * entered).sum()
            assert model.predict(entered) == pytest.approx(wanted, rel=1e-3)

    def test_a_latency_model_with_masks(self):
        detector = SceneDetector(images=2, masks=make_masks())
        model = fit_latency(detector, batches_of(detector, 1), most_proposals=24, rounds=1)
        assert model.spread < 1e-6
        assert (model.per_mask_call, model.per_mask) == pytest.approx(MASK_COSTS)
        per_call, per_region = np.array(COSTS)
        stages = 20 + (per_call + per_region * (40, 12, 3)).sum()
        assert model.predict((40, 12, 3), 7) == pytest.approx(stages + 1.5 + 7 * 0.25, rel=1e-3)

    @pytest.mark.parametrize("num_stages", [2, 3])
    def test_cascades_that_stop_early(self, num_stages):
        detector = SceneDetector(num_stages=num_stages).eval()
        policies = truncated_cascades(num_stages)
        assert list(policies) == ["1 stage", "2 stages"][: num_stages - 1]
        (batch,) = batches_of(detector, 4)
        inputs = vars(detector.cascade_inputs(batch))
        whole = detector.cascade
        for count, policy in enumerate(policies.values(), start=1):
            wanted, _ = truncate(whole, count).detect(**inputs)
            whole.exits = policy
            found, stats = whole.detect(**inputs)
            assert_same_detections(found, wanted)
            assert stats.entered[count:] == [0] * (num_stages - count)

    def test_batches_of_one_size(self):
        detector = SceneDetector(images=5)
        sizes = [len(batch) for batch in first_batches(batches_of(detector, 2), 9)]
        assert sizes == [2, 2]
        assert [len(b) for b in first_batches(batches_of(detector, 2), 1)] == [2]
        assert first_batches([], 3) == []

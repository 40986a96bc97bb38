"""Records of the full cascade and replays of exits on them."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_records import make_parts, make_recorded_scene
from region_views import both_policies, policy, some_policies
from small_cascades import (
    CHANNELS,
    assert_same_detections,
    make_cascade,
    make_scene,
    naive_twin,
    objectness_of,
    truncate,
)

from cascade_det.core.ensemble import ENSEMBLES
from cascade_det.core.record import CascadeRecord, RecordedStage, join_records

SOME = settings(max_examples=6)
NUM_REGIONS = 41


def make_learned():
    return make_parts(hidden=12, crop_channels=CHANNELS)


def inputs_of(scene, images=slice(None)):
    """Arguments of a cascade for some of the images."""
    return {
        "features": [level[images] for level in scene.features],
        "proposals": scene.proposals[images],
        "image_sizes": scene.image_sizes[images],
        "objectness": objectness_of(scene)[images],
    }


def outcome(record, exits, num_stages=None):
    """Detections and statistics of a replay."""
    replay = record.replay(exits, num_stages)
    return record.select(replay.reported), replay.stats


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("cls_agnostic", [True, False])
class TestReplayIsTheRun:
    def test_without_exits_bit_for_bit(self, ensemble, cls_agnostic):
        cascade = make_cascade(ensemble=ensemble, cls_agnostic=cls_agnostic)
        inputs = inputs_of(make_scene())
        record = cascade.record(**inputs)
        wanted, stats = cascade.detect(**inputs)
        found, replayed = outcome(record, None)
        assert_same_detections(found, wanted, exact=True)
        assert replayed == stats
        for num_stages in (1, 2, 3):
            wanted, _ = truncate(cascade, num_stages).detect(**inputs)
            found, stats = outcome(record, None, num_stages)
            assert_same_detections(found, wanted, exact=True)
            assert stats.entered == [NUM_REGIONS] * num_stages

    def test_with_exits(self, ensemble, cls_agnostic):
        cascade = make_cascade(ensemble=ensemble, cls_agnostic=cls_agnostic, score_thresh=0.1)
        close = 0

        @given(arguments=some_policies(), seed=st.integers(0, 100))
        @SOME
        def same(arguments, seed):
            nonlocal close
            inputs = inputs_of(make_scene(seed=seed, num_proposals=(15, 10)))
            cascade.exits, naive = both_policies(**arguments)
            record = cascade.record(**inputs)
            found, replayed = outcome(record, cascade.exits)
            naive_twin(cascade, naive).detect(**inputs)
            if naive.closest < 1e-5:  # of float32, in which batches of other sizes may differ
                close += 1
                return
            wanted, stats = cascade.detect(**inputs)
            assert replayed == stats
            assert_same_detections(found, wanted)
            for ours, theirs in zip(replayed.confidence, stats.confidence, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-5)

        same()
        assert close <= 2


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_replay_with_learned_parts(ensemble):
    parts = make_learned()
    cascade, inputs = make_cascade(ensemble=ensemble), inputs_of(make_scene())
    cascade.exits = policy(learned=parts)
    record = cascade.record(**inputs)
    views = [record.view(stage) for stage in (-1, 0, 1)]
    with torch.no_grad():
        chances = [parts.continue_probability(view).quantile(0.3).item() for view in views]
        ready = [parts.readiness(view).quantile(0.8).item() + 1e-4 for view in views[1:]]
    cascade.exits = policy(
        pruner_thresholds=[chance + 1e-4 for chance in chances],
        confidence="learned",
        thresholds=ready,
        localisation="predicted_iou",
        localisation_thresholds=[view.predicted_ious.median().item() + 1e-4 for view in views[1:]],
        learned=parts,
    )
    wanted, stats = cascade.detect(**inputs)
    assert stats.entered[0] < stats.proposed
    assert {"background", "confident"} <= {reason for left in stats.left[:2] for reason in left}
    found, replayed = outcome(record, cascade.exits)
    assert replayed == stats
    assert_same_detections(found, wanted)


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_a_shorter_cascade_with_exits(ensemble):
    cascade, inputs = make_cascade(ensemble=ensemble), inputs_of(make_scene())
    arguments = {"prune_thresholds": (0.4, 0.4), "redundancy_iou": 0.6, "thresholds": (0.7, 0.7)}
    record = cascade.record(**inputs)
    found, stats = outcome(
        record, policy(**arguments, score_shifts=(1.0, 0.5, 0.0), score_scales=(1.0, 1.0, 1.0)), 2
    )
    shorter = truncate(cascade, 2)
    shorter.exits = policy(
        num_stages=2,
        prune_thresholds=(0.4,),
        redundancy_iou=0.6,
        thresholds=(0.7,),
        score_scales=(1.0, 1.0),
        score_shifts=(1.0, 0.5),
    )
    wanted, real = shorter.detect(**inputs)
    assert stats == real
    assert stats.entered[1] < NUM_REGIONS
    assert_same_detections(found, wanted)


class TestRecord:
    def test_of_a_stage_as_the_cascade_computes_it(self):
        cascade = make_cascade(exits=policy(learned=make_learned()))
        inputs = inputs_of(make_scene())
        hidden = [[] for _ in range(3)]
        for seen, head in zip(hidden, cascade.box_head, strict=True):
            head.register_forward_hook(lambda _, x, y, seen=seen: seen.append(y))
        record = cascade.record(**inputs, hidden=True)
        stages = cascade.detect_stages(
            inputs["features"], inputs["proposals"], inputs["image_sizes"]
        )
        assert record.num_images == 2
        assert record.num_stages == 3
        assert record.image_sizes == inputs["image_sizes"]
        assert torch.equal(record.proposals, torch.cat(inputs["proposals"]))
        assert torch.equal(record.objectness, torch.cat(inputs["objectness"]))
        assert record.image_index.tolist() == [0] * 24 + [1] * 17
        assert record.crops.shape == (NUM_REGIONS, CHANNELS)
        tops = []
        for stage, (recorded, wanted) in enumerate(zip(record.stages, stages, strict=True)):
            assert torch.equal(recorded.boxes, torch.cat(wanted.boxes_after))
            assert torch.equal(record.view(stage).boxes_before, torch.cat(wanted.boxes_before))
            assert torch.equal(recorded.hidden, hidden[stage][0])
            assert not recorded.hidden.requires_grad
            ious = cascade.exits.learned.predict_ious(stage, recorded.hidden)
            assert torch.equal(recorded.predicted_ious, ious)
            tops.append(recorded.score_state.argmax(dim=1))
            agreements = torch.zeros(NUM_REGIONS, dtype=torch.int64)
            for row in range(NUM_REGIONS):
                while (
                    agreements[row] < stage
                    and tops[stage - 1 - agreements[row]][row] == tops[stage][row]
                ):
                    agreements[row] += 1
            assert torch.equal(recorded.agreements, agreements)
        assert all(stage.hidden is None for stage in cascade.record(**inputs).stages)

    def test_views_are_what_a_policy_sees(self):
        cascade = make_cascade(exits=policy(learned=make_learned(), pruner_thresholds=(1e-9,) * 3))
        inputs = inputs_of(make_scene())
        seen, decide = [], cascade.exits.decide
        cascade.exits.decide = lambda view, _: seen.append(view) or decide(view)
        with torch.no_grad():
            cascade.detect(**inputs)
        record = cascade.record(**inputs)
        assert len(seen) == 3
        for theirs in seen:
            ours = record.view(theirs.stage)
            for field in dataclasses.fields(theirs):
                got, wanted = getattr(ours, field.name), getattr(theirs, field.name)
                if field.name == "proposal_index":
                    assert got is None or torch.equal(got, wanted)
                elif field.name == "sizes":
                    assert wanted == theirs.counts.tolist()
                elif isinstance(wanted, torch.Tensor):
                    assert torch.equal(got, wanted)
                else:
                    assert got == wanted

    def test_without_learned_parts(self):
        record = make_cascade().record(**inputs_of(make_scene()))
        assert record.crops is None
        assert all(stage.predicted_ious is None for stage in record.stages)
        with pytest.raises(ValueError, match="no crops"):
            record.replay(policy(pruner_thresholds=(0.5, 0, 0), learned=make_learned()))

    @pytest.mark.parametrize("counts", [(0, 0), (9, 0)])
    def test_of_nothing(self, counts):
        cascade, inputs = make_cascade(), inputs_of(make_scene(num_proposals=counts))
        record = cascade.record(**inputs)
        for exits in (None, policy(redundancy_iou=0.5, proposal_threshold=0.9999)):
            cascade.exits = exits
            wanted, stats = cascade.detect(**inputs)
            found, replayed = outcome(record, exits)
            assert replayed == stats
            assert_same_detections(found, wanted)
            assert found[1].boxes.shape == (0, 4)

    def test_replays_do_not_change_it(self):
        record = make_recorded_scene().record
        before = [tensor.clone() for tensor in tensors_of(record)]
        exits = policy(prune_thresholds=(0.3, 0.3), redundancy_iou=0.5, thresholds=(0.7, 0.6))
        first, second = outcome(record, exits), outcome(record, exits)
        assert first[1] == second[1]
        assert_same_detections(first[0], second[0], exact=True)
        for tensor, old in zip(tensors_of(record), before, strict=True):
            assert torch.equal(tensor, old)

    def test_time_budgets_have_no_meaning(self):
        record = make_recorded_scene().record
        calls = []
        exits = policy(time_budget_ms=1e-6, clock=lambda: calls.append(0) or 0.0)
        assert outcome(record, exits)[1] == outcome(record, None)[1]
        assert calls == []

    @pytest.mark.parametrize("cls_agnostic", [True, False])
    def test_detections_name_their_regions(self, cls_agnostic):
        record = make_recorded_scene(cls_agnostic=cls_agnostic).record
        replay = record.replay(policy(thresholds=(0.5, 0.5)))
        stages = set()
        for image, found in enumerate(record.select(replay.reported)):
            assert (record.image_index[found.rows] == image).all()
            for d in range(len(found)):
                stage, row, label = (
                    x[d].item() for x in (found.exit_stages, found.rows, found.classes)
                )
                box = record.stages[stage].decoded[row].view(-1, 4)[0 if cls_agnostic else label]
                assert found.boxes[d].tolist() == box.tolist()
                assert found.scores[d] == record.final_probs(stage)[row, label]
                stages.add(stage)
            assert found[:2].rows.tolist() == found.rows.tolist()[:2]
        assert stages == {0, 1, 2}

    def test_regions_of_each_image_that_enter(self):
        record = make_recorded_scene(num_proposals=(30, 0, 20), num_objects=(4, 0, 3)).record
        exits = policy(proposal_threshold=0.5, prune_thresholds=(0.4, 0.4), region_budget=(0, 8, 5))
        replay = record.replay(exits)
        assert replay.entered.shape == (3, 3)
        assert replay.entered.sum(dim=1).tolist() == replay.stats.entered
        for image in range(3):
            alone = record.select_images([image]).replay(exits)
            assert alone.stats.entered == replay.entered[:, image].tolist()
        assert record.replay(None).entered.tolist() == [[30, 0, 20]] * 3


def tensors_of(record):
    parts = (record, *record.stages)
    values = (value for part in parts for value in vars(part).values())
    return [value for value in values if isinstance(value, torch.Tensor)]


class TestJoining:
    EXITS = staticmethod(
        lambda: policy(prune_thresholds=(0.3, 0.3), redundancy_iou=0.5, thresholds=(0.7, 0.6))
    )

    def test_images_one_by_one_make_the_batch(self):
        cascade, scene = make_cascade(exits=policy(learned=make_learned())), make_scene()
        together = cascade.record(**inputs_of(scene), hidden=True)
        singles = [
            cascade.record(**inputs_of(scene, slice(i, i + 1)), hidden=True) for i in range(2)
        ]
        joined = join_records(singles)
        assert joined.image_sizes == together.image_sizes
        for ours, theirs in zip(tensors_of(joined), tensors_of(together), strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert torch.equal(joined.image_index, together.image_index)

    def test_a_joined_record_does_what_its_parts_do(self):
        scenes = [make_recorded_scene(seed=s, num_proposals=(30, s)).record for s in range(4)]
        joined = join_records(scenes)
        assert joined.num_images == 8
        found, stats = outcome(joined, self.EXITS())
        parts = [outcome(record, self.EXITS()) for record in scenes]
        wanted = [detections for images, _ in parts for detections in images]
        assert_same_detections(found, wanted, exact=True)
        entered = torch.tensor([stats.entered for _, stats in parts]).sum(dim=0)
        assert stats.entered == entered.tolist()

    def test_some_of_the_images(self):
        record = make_recorded_scene(num_proposals=(30, 0, 20), num_objects=(4, 0, 3)).record
        found, _ = outcome(record, self.EXITS())
        chosen, _ = outcome(record.select_images([2, 0, 2, 1]), self.EXITS())
        assert_same_detections(chosen, [found[i] for i in (2, 0, 2, 1)], exact=True)
        assert record.select_images([]).num_images == len(record.select_images([]).proposals) == 0

    def test_what_one_lacks_all_lack(self):
        with_crops, without = make_recorded_scene().record, make_recorded_scene(seed=1).record
        without.crops = without.stages[1].hidden = None
        for records in ((with_crops, without), (without, with_crops)):
            joined = join_records(records)
            assert joined.crops is None
            assert joined.stages[1].hidden is None
            assert len(joined.stages[0].hidden) == len(joined.proposals) == 100

    def test_nothing_is_told(self):
        with pytest.raises(ValueError, match="no records"):
            join_records([])

    def test_on_the_cpu(self):
        record = make_recorded_scene().record
        moved = record.cpu()
        assert isinstance(moved, CascadeRecord)
        assert all(isinstance(stage, RecordedStage) for stage in moved.stages)
        for ours, theirs in zip(tensors_of(moved), tensors_of(record), strict=True):
            assert torch.equal(ours, theirs)

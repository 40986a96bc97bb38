"""Tile thresholds in a record of the full cascade, against detectors that compute in tiles."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_records import make_parts
from small_cascades import CHANNELS, POOLED, STRIDES, assert_same_detections
from small_detectors import make_detector, make_masks, random_image

from cascade_det.calibration.image_matching import ImageMatcher
from cascade_det.calibration.recording import fit_latency, record_dataset, time_policies
from cascade_det.calibration.trials import ExitTrials
from cascade_det.core import ExitPolicy, RoIPooler
from cascade_det.core.record import join_records
from cascade_det.core.recorded_tiles import join_proposals
from cascade_det.standalone import optimize

SIZES = ((128, 192), (96, 160), (160, 96), (128, 192))
RULES = {"prune_thresholds": (0.4, 0.5), "thresholds": (0.9, 0.8), "redundancy_iou": 0.7}


def batches_of(size, sizes=SIZES):
    samples = [
        {
            "image": random_image(*size, seed=seed),
            "image_id": seed,
            "height": size[0],
            "width": size[1],
        }
        for seed, size in enumerate(sizes)
    ]
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def trials_of(recording):
    content = {
        "images": [{"id": i, "height": 1, "width": 1} for i in recording.image_ids],
        "categories": [{"id": i, "name": str(i)} for i in (1, 2, 3)],
        "annotations": [
            {"image_id": i, "category_id": 1, "bbox": [5, 5, 50, 50]} for i in recording.image_ids
        ],
    }
    return ExitTrials(recording, ImageMatcher(content, [1, 2, 3]), score=0.3)


@torch.no_grad()
def thresholds_of(detector, batches):
    """Some that open few and more tiles, and one that opens none."""
    scores = []
    for batch in batches:
        maps = detector.backbone(detector.preprocess([s["image"] for s in batch])[0])
        logits, _ = detector.proposal_generator.rpn_head([maps["p3"]])
        scores.append(logits[0].sigmoid().flatten())
    chosen = torch.cat(scores).quantile(torch.tensor([0.9, 0.99, 0.995, 0.999]))
    return (0.0, *chosen.tolist(), 1.0)


@pytest.mark.parametrize("is_fast", [False, True])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("rules", [{}, RULES])
def test_a_replay_with_a_threshold_is_the_run(is_fast, masks, rules):
    detector = make_detector(masks=make_masks() if masks else None, score_thresh=0.1)
    if is_fast:
        detector = optimize(detector, dtype="float32")
    batches = batches_of(1)
    thresholds = thresholds_of(detector, batches)
    recording = record_dataset(detector, batches, 4, tile_thresholds=thresholds)
    assert recording.tile_thresholds == thresholds
    trials, shares = trials_of(recording), set()
    for threshold in thresholds:
        trial, stats = same_as_the_run(detector, trials, batches, threshold, rules)
        assert trial.entered.T.tolist() == [own.entered for own in stats]
        dense, opened, later, whole = trial.tiles
        for image, own in enumerate(stats):
            if threshold == 0:
                assert own.tiles == 0
                assert trial.tiles[1:].sum() == 0
                continue
            assert own.tiles_open == dense[image] + opened[image]
            assert own.tiles_whole == dense[image] + whole[image]
            if own.tiles_whole:
                assert own.tiles_computed == own.tiles_whole == own.tiles
            else:
                assert own.tiles_computed == opened[image] + later[image]
            shares.add(own.tiles_open / own.tiles)
    assert {0, 1} < shares


def test_a_pruner_reads_the_tiles_of_all_proposals():
    parts = make_parts(crop_channels=CHANNELS, hidden=12, seed=2)
    exits = ExitPolicy(num_stages=3, learned=parts)
    detector = make_detector(exits=exits, score_thresh=0.1)
    batches = batches_of(1)
    trials = trials_of(record_dataset(detector, batches, 4, tile_thresholds=(0.0, 1.0)))
    pruned = {"learned": parts, "pruner_thresholds": (0.45, 0.0, 0.0)}
    trial, stats = same_as_the_run(detector, trials, batches, 1.0, pruned)
    alone, _ = same_as_the_run(detector, trials, batches, 1.0, {})
    assert trial.entered[0].sum() < alone.entered[0].sum()
    for image, own in enumerate(stats):
        assert own.tiles_computed == max(trial.tiles[2:, image])
    assert (trial.tiles[2:].max(axis=0) == alone.tiles[2:].max(axis=0)).any()


def test_so_is_that_of_a_batch_of_several():
    detector = make_detector(score_thresh=0.1)
    batches = batches_of(3)
    thresholds = thresholds_of(detector, batches)
    trials = trials_of(record_dataset(detector, batches, 4, tile_thresholds=thresholds))
    for threshold in thresholds:
        trial, stats = same_as_the_run(detector, trials, batches, threshold, RULES)
        assert trial.entered.sum(axis=1).tolist() == np.sum([x.entered for x in stats], 0).tolist()
        open_ = sum(own.tiles_open for own in stats)
        assert trial.tiles[:2].sum() == (open_ if threshold else trial.tiles.sum())


def test_work_on_tiles_of_a_batch_with_a_whole_image():
    detector = make_detector(score_thresh=0.1)
    batches = batches_of(2)
    thresholds = thresholds_of(detector, batches)
    trials = trials_of(record_dataset(detector, batches, 4, tile_thresholds=thresholds))
    mixed = False
    for threshold in thresholds[1:]:
        policy = ExitPolicy(num_stages=3, tile_threshold=threshold, region_budget=(1, 1, 1))
        (timings,) = time_policies(detector, batches, {"one": policy}, rounds=1).values()
        tiles = trials.replay(policy).tiles
        assert not tiles[3].any()
        wanted = tiles.reshape(4, 2, 2).sum(axis=2).T
        assert [list(own.tile_work) for own in timings] == wanted.tolist()
        mixed |= bool(wanted[:, :2].all(axis=1).any())
    assert mixed


def test_a_pooler_that_reads_whole_maps_computes_all_tiles():
    pooler = RoIPooler(output_size=POOLED, strides=STRIDES, kernel="torchvision")
    detector = make_detector(score_thresh=0.1, pooler=pooler)
    batches = batches_of(2)
    thresholds = thresholds_of(detector, batches)
    trials = trials_of(record_dataset(detector, batches, 4, tile_thresholds=thresholds))
    few = {"region_budget": (2, 1, 1)}
    for threshold in thresholds[1:]:
        trial, stats = same_as_the_run(detector, trials, batches, threshold, few)
        dense, opened, later, whole = trial.tiles
        computed = dense + np.where(whole, whole, opened + later)
        assert computed.sum() == sum(own.tiles_computed for own in stats)


def same_as_the_run(detector, trials, batches, threshold, rules):
    """The trial of a threshold, and the statistics of a detector with it."""
    policy = ExitPolicy(num_stages=3, tile_threshold=threshold, **rules)
    detector.set_exits(policy)
    outputs = [detector.detect(batch) for batch in batches]
    found = [detections for output in outputs for detections in output.detections]
    assert_same_detections(trials.detections(policy), found)
    return trials.replay(policy), [output.stats for output in outputs]


def test_the_whole_map_is_recorded_as_without_thresholds():
    detector = make_detector()
    batches = batches_of(2)
    alone = record_dataset(detector, batches, 4)
    beside = record_dataset(detector, batches, 4, tile_thresholds=(0.0, 0.3, 1.0))
    assert alone.tile_thresholds == ()
    assert beside.most_proposals == alone.most_proposals
    assert len(beside.records[0].proposals) > len(alone.records[0].proposals)
    wanted, got = trials_of(alone), trials_of(beside)
    assert (got.full.entered == wanted.full.entered).all()
    assert_same_detections(got.detections(None), wanted.detections(None))
    policy = ExitPolicy(num_stages=3, **RULES)
    assert_same_detections(got.detections(policy), wanted.detections(policy))
    assert got.recording.of_images([2, 0]).tile_thresholds == (0.0, 0.3, 1.0)


@pytest.mark.parametrize("tile_thresholds", [(), (0.0, 0.3)])
def test_a_threshold_that_was_not_recorded(tile_thresholds):
    recording = record_dataset(make_detector(), batches_of(2), 2, tile_thresholds=tile_thresholds)
    policy = ExitPolicy(num_stages=3, tile_threshold=0.25)
    with pytest.raises(ValueError, match=r"tile threshold .*0\.25"):
        recording.records[0].replay(policy)


def test_images_of_a_record_are_those_of_a_record_of_them():
    detector = make_detector()
    recording = record_dataset(detector, batches_of(2), 4, tile_thresholds=(0.0, 0.3, 1.0))
    for images in ([2, 0], [1], [3, 1, 2]):
        some = trials_of(recording.of_images(images))
        for threshold in (0.0, 0.3, 1.0):
            policy = ExitPolicy(num_stages=3, tile_threshold=threshold, **RULES)
            whole, part = trials_of(recording).replay(policy), some.replay(policy)
            kept = sorted(images)
            assert (part.tiles == whole.tiles[:, kept]).all()
            assert (part.entered == whole.entered[:, kept]).all()


@given(seed=st.integers(0, 10**6), count=st.integers(1, 4))
@settings(max_examples=40)
def test_proposals_of_thresholds_together(seed, count):
    """Against sets of numbers, with ties and proposals that are there twice."""
    rng = np.random.default_rng(seed)
    lists = []
    for _ in range(count):
        rows = rng.integers(0, 3, (rng.integers(0, 7), 5)).astype(np.float32)
        rows = rows[np.argsort(-rows[:, 0], kind="stable")]
        lists.append(torch.from_numpy(rows))
    proposals = [([rows[:, 1:]], [rows[:, 0]]) for rows in lists]
    opened = [torch.zeros(1, 2, 2, dtype=torch.bool)] * count
    (boxes,), (logits,), tiles = join_proposals(proposals, range(count), opened)
    rows = torch.cat([logits[:, None], boxes], dim=1)
    assert (logits.diff() <= 0).all()
    for own, member in zip(lists, tiles.members.T, strict=True):
        assert sorted(rows[member].tolist()) == sorted(own.tolist())
    assert rows[tiles.members[:, 0]].tolist() == lists[0].tolist()
    most = {}
    for own in lists:
        numbers = [tuple(row) for row in own.tolist()]
        for row in numbers:
            most[row] = max(most.get(row, 0), numbers.count(row))
    assert len(rows) == sum(most.values())


def test_joined_records_have_the_same_thresholds():
    detector = make_detector()
    batches = batches_of(2)
    first, second = (
        record_dataset(detector, [batch], 2, tile_thresholds=(0.0, value)).records[0]
        for batch, value in zip(batches, (0.3, 0.4), strict=True)
    )
    with pytest.raises(ValueError, match="different tile thresholds"):
        join_records([first, second])


def test_a_latency_model_of_a_detector_with_a_tile_gate(monkeypatch):
    """Each call takes what its tiles and regions are said to take."""
    rates = np.array([0.4, 0.7, 0.3, 0.2])

    def measured(*arguments, **options):
        timings = time_policies(*arguments, **options)
        tiles = [max(calls[i].tiles for calls in timings.values()) for i in range(4)]

        def timed(i, call):
            work = call.tile_work if call.tiles else (tiles[i % 4], 0, 0, 0)
            maps = 15 + float(rates @ work)
            milliseconds = maps + 5 + 0.01 * sum(call.entered)
            return call._replace(milliseconds=milliseconds, map_milliseconds=maps)

        return {name: [*map(timed, range(4), calls)] for name, calls in timings.items()}

    monkeypatch.setattr("cascade_det.calibration.recording.time_policies", measured)
    detector = make_detector(score_thresh=0.1)
    batches = batches_of(1)
    thresholds = thresholds_of(detector, batches)
    options = {"most_proposals": 40, "rounds": 1}
    model = fit_latency(detector, batches, **options, tile_thresholds=thresholds)
    assert model.spread < 1e-6
    recording = record_dataset(detector, batches, 4, tile_thresholds=thresholds)
    trials = trials_of(recording)
    for threshold in thresholds:
        trial = trials.replay(ExitPolicy(num_stages=3, tile_threshold=threshold, **RULES))
        wanted = 20 + (0.01 * trial.entered.sum() + (rates @ trial.tiles).sum()) / 4
        predicted = model.per_image(trial.entered, trial.masks, trial.tiles)
        assert predicted == pytest.approx(wanted, rel=1e-3)
    assert fit_latency(detector, batches, **options).per_tile == ()

"""Dice, HD95, Jaccard and ASSD: official numbers, all pairs of points, and volumes in slices."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import description, vectors
from scipy.spatial.distance import cdist

from cascade_det.errors import DatasetError
from cascade_det.evaluation import VolumeEvaluator, VolumeSlice
from cascade_det.evaluation.volumes import compare_masks, compare_volumes
from cascade_det.segmentation.output import SegmenterOutput, SegmenterStats

NAMES = ["background", "liver", "spleen"]
# Names in the file of official numbers.
OFFICIAL = ("dice", "hd95", "jaccard", "assd")


def surface(mask):
    """Indices [S, axes] of elements with a neighbour outside, one by one."""
    padded = np.pad(mask, 1)
    found = []
    for point in np.argwhere(padded):
        for axis in range(mask.ndim):
            for step in (-1, 1):
                neighbour = point.copy()
                neighbour[axis] += step
                if not padded[tuple(neighbour)]:
                    found.append(point - 1)
    return np.unique(found, axis=0)


def naive_scores(prediction, truth, spacing):
    common, total = (prediction & truth).sum(), prediction.sum() + truth.sum()
    points = [surface(mask) * np.asarray(spacing) for mask in (prediction, truth)]
    distances = cdist(*points)
    joined = np.concatenate([distances.min(1), distances.min(0)])
    return (
        2 * common / total,
        np.percentile(joined, 95),
        common / (prediction | truth).sum(),
        joined.mean(),
    )


@pytest.mark.parametrize(
    "name",
    ["two_blobs", "near", "shifted", "one_voxel", "empty_pred", "empty_gt", "both_empty"],
)
def test_official_scores(name):
    tensors, expected = vectors("segmentation_metrics"), description("segmentation_metrics")
    expected = expected["values"][name]
    pair = [tensors[f"{name}.{which}"].numpy() > 0 for which in ("pred", "gt")]
    scores = compare_masks(*pair).published()
    assert scores._fields == OFFICIAL
    assert scores._asdict() == {metric: expected[metric] for metric in OFFICIAL}  # all digits
    if "hd95_with_voxelspacing_3_1_1" in expected:
        sized = compare_masks(*pair, spacing=(3, 1, 1)).published()
        assert sized.hd95 == expected["hd95_with_voxelspacing_3_1_1"]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(5, 7), (4, 5, 6), (1, 6, 6), (12, 1, 3)]),
    density=st.sampled_from([0.05, 0.4, 0.9]),
    sized=st.booleans(),
)
def test_scores_are_those_of_all_pairs_of_points(seed, shape, density, sized):
    rng = np.random.default_rng(seed)
    pair = [rng.random(shape) < density for _ in range(2)]
    for mask in pair:
        mask.flat[rng.integers(mask.size)] = True
    spacing = rng.uniform(0.5, 3, len(shape)) if sized else None
    expected = naive_scores(*pair, spacing if sized else np.ones(len(shape)))
    scores = compare_masks(*pair, spacing=spacing)
    np.testing.assert_allclose(scores.published(), expected, rtol=1e-12)
    assert scores.strict() == scores.published()


def test_space_around_the_masks_changes_nothing():
    """Only the box of both is computed, also where they touch the border of the array."""
    rng = np.random.default_rng(0)
    pair = [rng.random((6, 7, 8)) < 0.3 for _ in range(2)]
    wide = [np.pad(mask, ((3, 9), (0, 20), (11, 2))) for mask in pair]
    assert compare_masks(*wide).published() == compare_masks(*pair).published()


def test_a_shift_is_a_distance():
    cube = np.zeros((9, 9, 9), bool)
    cube[2:5, 2:5, 2:5] = True
    scores = compare_masks(np.roll(cube, 3, 1), cube, spacing=(1, 2, 1)).published()
    # 9 of 26 surface elements are three rows of 2 mm away from the other cube.
    assert (scores.dice, scores.jaccard, scores.hd95) == (0, 0, 6)
    assert compare_masks(cube, cube).published() == (1, 0, 1, 0)


def test_conventions_where_a_mask_is_empty():
    full, empty = np.ones((2, 3, 6), bool), np.zeros((2, 3, 6), bool)
    miss, alarm, nothing = (compare_masks(*p) for p in ((empty, full), (full, empty), (empty,) * 2))
    assert miss.published() == (0, 0, 0, 0)
    assert alarm.published() == (1, 0, 1, 0)
    assert nothing.published() == (0, 0, 0, 0)
    diagonal = 7  # sqrt(4 + 9 + 36)
    assert miss.strict() == alarm.strict() == (0, diagonal, 0, diagonal)
    assert all(math.isnan(value) for value in nothing.strict())
    sized = compare_masks(empty, full, spacing=(3, 2, 1.5)).strict()
    assert sized.hd95 == pytest.approx(math.hypot(6, 6, 9))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_classes_are_compared_one_by_one(dtype):
    rng = np.random.default_rng(1)
    prediction, truth = rng.integers(0, 5, (2, 4, 6, 6)).astype(dtype)
    truth[0, 0] = 255 if dtype == np.uint8 else 300  # of no class
    truth[truth == 3] = 0
    found = compare_volumes(prediction, truth, 5)
    assert found == [compare_masks(prediction == k, truth == k) for k in range(1, 5)]
    assert [one.in_truth for one in found] == [True, True, False, True]


def test_arrays_that_do_not_fit_are_named():
    mask = np.ones((2, 3), bool)
    with pytest.raises(ValueError, match=r"shape \(2, 3\), the truth \(3, 2\)"):
        compare_masks(mask, mask.T)
    for spacing in ((1, 1, 1), (1, 0)):
        with pytest.raises(ValueError, match="expected 2 sizes above 0"):
            compare_masks(mask, mask, spacing=spacing)


def sample_slices(seed, depths):
    """Samples of volumes ``v0``, ``v1``, ..., slice by slice, and what a segmenter said."""
    rng = np.random.default_rng(seed)
    samples, outputs = [], []
    for number, depth in enumerate(depths):
        for index in range(depth):
            place = VolumeSlice(f"v{number}", index, depth, (2.0, 1.0, 1.0))
            truth = rng.integers(0, 3, (5, 6))
            samples.append({"place": place, "truth": truth, "file_name": "a.npz"})
            outputs.append(torch.from_numpy(rng.standard_normal((3, 5, 6))))
    return samples, outputs


def evaluator():
    return VolumeEvaluator(
        class_names=NAMES, truth_of=lambda s: s["truth"], slice_of=lambda s: s["place"]
    )


def segmented(*scores):
    return SegmenterOutput(list(scores), SegmenterStats())


def processed(samples, outputs, order=None):
    whole = evaluator()
    for index in range(len(samples)) if order is None else order:
        whole.process([samples[index]], segmented(outputs[index]))
    return whole


def test_slices_are_scored_as_volumes():
    samples, outputs = sample_slices(0, (3, 2))
    results = processed(samples, outputs).evaluate()
    volumes = evaluator()
    for name, part in (("v0", slice(0, 3)), ("v1", slice(3, 5))):
        prediction = [scores.argmax(0).numpy() for scores in outputs[part]]
        truth = [sample["truth"] for sample in samples[part]]
        volumes.add_volume(name, prediction, np.stack(truth), spacing=(2, 1, 1))
        voxels = compare_volumes(np.stack(prediction), np.stack(truth), 3)
        found = results["volumes"]["per_volume"][name]
        assert found["Dice-liver"] == pytest.approx(100 * voxels[0].published().dice)
        assert found["HD95-spleen"] == voxels[1].published().hd95
        mean = sum(one.published().assd for one in voxels) / 2
        assert found["ASSD"] == pytest.approx(mean)
        sized = compare_volumes(np.stack(prediction), np.stack(truth), 3, spacing=(2, 1, 1))
        strict = results["volumes_strict"]["per_volume"][name]
        assert strict["ASSD-liver"] == sized[0].strict().assd != found["ASSD-liver"]
    assert volumes.evaluate() == results


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), owners=st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_shares_give_the_scores_of_the_whole(seed, owners):
    samples, outputs = sample_slices(seed, (3, 1, 2))
    order = np.random.default_rng(seed).permutation(6)
    parts = [
        processed(samples, outputs, [i for i in order if owners[i] == rank]) for rank in range(3)
    ]
    states = [pickle.loads(pickle.dumps(part.state())) for part in parts]
    parts[2].merge(states)
    assert parts[2].evaluate() == processed(samples, outputs).evaluate()


def test_means_are_over_classes_and_then_over_volumes():
    volumes = evaluator()
    truth = np.ones((1, 3, 4), int)
    volumes.add_volume("only a liver", truth, truth)
    truth = np.array([[[1, 1, 2, 2]] * 3])
    volumes.add_volume("missed spleen", np.where(truth == 2, 0, truth), truth)
    volumes.add_volume("nothing", 0 * truth, 0 * truth)
    results = volumes.evaluate()
    published, strict = results["volumes"], results["volumes_strict"]
    # An absent class is a Dice of 0 as published, and does not count in the strict convention.
    assert published["Dice"] == pytest.approx(100 * (0.5 + 0.5 + 0) / 3)
    assert strict["Dice"] == pytest.approx(100 * (1 + 0.5) / 2)
    assert strict["Dice-liver"] == 100
    assert strict["Dice-spleen"] == 0
    # The missed spleen costs the diagonal: 1 x 3 x 4 voxels.
    assert published["HD95"] == 0
    assert strict["HD95"] == pytest.approx((0 + math.sqrt(26) / 2) / 2)
    assert math.isnan(strict["per_volume"]["nothing"]["Dice"])
    assert math.isnan(strict["per_volume"]["only a liver"]["Dice-spleen"])


def test_no_volumes_and_incomplete_ones(caplog):
    samples, outputs = sample_slices(0, (3, 2))
    part = processed(samples[:4], outputs[:4])
    results = part.evaluate()
    assert list(results["volumes"]["per_volume"]) == ["v0"]
    assert "Volume v1 is not scored: 1 of 2 slices were seen" in caplog.text
    nothing = evaluator().evaluate()
    assert math.isnan(nothing["volumes"]["Dice"])
    assert json.dumps(nothing["volumes"]["per_volume"]) == "{}"


def test_what_comes_twice_is_refused():
    samples, outputs = sample_slices(0, (2, 1))
    part = processed(samples[:1], outputs[:1])
    with pytest.raises(DatasetError, match="volume v0: slice 0 was processed twice"):
        part.process(samples[:1], segmented(*outputs[:1]))
    part = processed(samples[2:], outputs[2:])
    with pytest.raises(DatasetError, match="volume v1: it was processed before"):
        part.process(samples[2:], segmented(*outputs[2:]))
    with pytest.raises(DatasetError, match="volume v1 was processed by two processes"):
        evaluator().merge([part.state(), part.state()])


def test_a_truth_of_another_size_is_named():
    with pytest.raises(
        DatasetError, match=r"volume a: .* shape \(1, 2, 3\), the truth \(2, 2, 3\)"
    ):
        evaluator().add_volume("a", np.zeros((1, 2, 3), int), np.zeros((2, 2, 3), int))

"""Repeat factors, and the stream of batches that they make."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade_det.data.repeat_factors import repeat_factors
from cascade_det.data.sampler import TrainingBatchSampler

class_lists = st.lists(st.lists(st.integers(0, 4), max_size=6), min_size=1, max_size=20)


def arrays(classes):
    return [np.array(own, dtype=np.int64) for own in classes]


def test_factors_by_hand():
    # Of 8 images class 0 is in 8, class 1 in 2 and class 3 in 1; no image has class 2.
    classes = arrays([[0, 0], [0], [0, 1], [1, 0], [0], [3, 0, 3], [0], [0]])
    rare, rarer = 2**0.5, 2.0  # sqrt(0.5 / (2 / 8)) and sqrt(0.5 / (1 / 8))
    wanted = [1, 1, rare, rare, 1, rarer, 1, 1]
    np.testing.assert_allclose(repeat_factors(classes, 0.5), wanted, rtol=1e-7)
    wanted = [1, 1, 2, 2, 1, 4, 1, 1]
    np.testing.assert_array_equal(repeat_factors(classes, 0.5, square_root=False), wanted)
    np.testing.assert_array_equal(repeat_factors(arrays([[], []]), 0.5), [1, 1])


@given(classes=class_lists, threshold=st.floats(0, 1), root=st.booleans())
def test_factors_are_detectron2s(classes, threshold, root):
    samplers = pytest.importorskip("detectron2.data.samplers")
    dicts = [{"annotations": [{"category_id": c} for c in own]} for own in classes]
    theirs = samplers.RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        dicts, threshold, sqrt=root
    )
    ours = repeat_factors(arrays(classes), threshold, square_root=root)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs.numpy())


def first_batches(number, factors, images_per_batch, *, seed, groups=None, **keywords):
    factors = np.array(factors, dtype=np.float32)
    sampler = TrainingBatchSampler(
        len(factors),
        images_per_batch,
        seed=seed,
        groups=groups or [0] * len(factors),
        factors=factors,
        **keywords,
    )
    return list(itertools.islice(sampler, number))


def test_images_are_seen_as_often_as_their_factors_say():
    factors = [1.0, 1.25, 2.5, 3.0]
    epochs = 2000
    total = int(epochs * sum(factors))
    counts = Counter(batch[0][1] for batch in first_batches(total, factors, 1, seed=4))
    for image, factor in enumerate(factors):
        # Rounding draws an image once more by a coin: 5 standard deviations of all epochs.
        assert abs(counts[image] / epochs - factor) < 5 * 0.5 / epochs**0.5 + 0.01


def test_factors_of_1_change_nothing():
    plain = TrainingBatchSampler(11, 3, seed=9, groups=[0] * 11)
    assert first_batches(20, [1.0] * 11, 3, seed=9) == list(itertools.islice(plain, 20))


@given(
    factors=st.lists(st.floats(1, 4), min_size=1, max_size=9),
    seed=st.integers(0, 2**63),
    start_batch=st.integers(0, 30),
    data=st.data(),
)
def test_a_batch_depends_on_the_seed_and_its_number_only(factors, seed, start_batch, data):
    size = len(factors)
    groups = data.draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
    arguments = {"seed": seed, "groups": groups}
    whole = first_batches(start_batch + 4, factors, 4, **arguments)[start_batch:]
    assert first_batches(4, factors, 4, **arguments, start_batch=start_batch) == whole
    parts = [
        first_batches(4, factors, 4, **arguments, start_batch=start_batch, share=(rank, 2))
        for rank in (0, 1)
    ]
    assert [one + other for one, other in zip(*parts, strict=True)] == whole
    positions = [
        position for batch in first_batches(30, factors, 1, seed=seed) for position, _ in batch
    ]
    assert positions == list(range(30))

"""Laws of the stream of batches, over many sizes."""

import itertools
from collections import Counter, defaultdict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cascade_det.data.sampler import (
    TrainingBatchSampler,
    aspect_ratio_groups,
    augmentation_generator,
)

seeds = st.integers(0, 2**63)
batch_sizes = st.integers(1, 7)
groupings = st.lists(st.integers(0, 1), min_size=1, max_size=23)


def first_batches(number, num_images, *arguments, groups=None, **keywords):
    groups = groups or [0] * num_images
    sampler = TrainingBatchSampler(num_images, *arguments, groups=groups, **keywords)
    return list(itertools.islice(sampler, number))


@given(num_images=st.integers(1, 23), images_per_batch=batch_sizes, seed=seeds)
def test_every_image_once_per_epoch(num_images, images_per_batch, seed):
    epochs = 3
    batches = first_batches(epochs * num_images, num_images, images_per_batch, seed=seed)
    samples = [sample for batch in batches for sample in batch]
    assert {len(batch) for batch in batches} == {images_per_batch}
    assert [position for position, _ in samples] == list(range(len(samples)))
    for epoch in range(epochs):
        part = samples[epoch * num_images : (epoch + 1) * num_images]
        assert sorted(index for _, index in part) == list(range(num_images))


@given(groups=groupings, images_per_batch=batch_sizes, seed=seeds)
def test_groups_are_not_mixed_and_lose_nothing(groups, images_per_batch, seed):
    batches = first_batches(12, len(groups), images_per_batch, seed=seed, groups=groups)
    found = defaultdict(list)
    for batch in batches:
        assert len(batch) == images_per_batch
        assert len({groups[index] for _, index in batch}) == 1
        found[groups[batch[0][1]]] += batch
    longest = max(position for batch in batches for position, _ in batch) + 1
    ungrouped = [batch[0] for batch in first_batches(longest, len(groups), 1, seed=seed)]
    for group, samples in found.items():
        # Grouping changes when a sample comes, not which samples there are.
        assert samples == [s for s in ungrouped if groups[s[1]] == group][: len(samples)]


@given(
    groups=groupings | st.none(),
    images_per_batch=batch_sizes,
    seed=seeds,
    start_batch=st.integers(0, 40),
)
def test_starting_later_is_skipping(groups, images_per_batch, seed, start_batch):
    size = len(groups) if groups else 11
    arguments = {"seed": seed, "groups": groups}
    skipped = first_batches(start_batch + 5, size, images_per_batch, **arguments)[start_batch:]
    started = first_batches(5, size, images_per_batch, **arguments, start_batch=start_batch)
    assert started == skipped


def test_iterating_again_starts_again():
    sampler = TrainingBatchSampler(7, 2, seed=1, groups=[0, 1, 0, 1, 0, 0, 1], start_batch=3)
    assert list(itertools.islice(sampler, 9)) == list(itertools.islice(sampler, 9))


def test_epochs_and_seeds_differ():
    orders = [
        tuple(index for _, index in batch)
        for seed in (0, 1)
        for batch in first_batches(3, 50, 50, seed=seed)
    ]
    assert len(set(orders)) == 6


def test_the_first_place_is_shared_evenly():
    firsts = Counter(first_batches(1, 4, 1, seed=seed)[0][0][1] for seed in range(800))
    assert sorted(firsts) == [0, 1, 2, 3]
    assert all(150 < count < 250 for count in firsts.values())  # 200 +- 4 standard deviations


def test_augmentation_generators_repeat_and_differ():
    def draw(seed, position):
        return tuple(augmentation_generator(seed, position).integers(0, 2**60, 2))

    assert draw(3, 4) == draw(3, 4)
    assert len({draw(seed, position) for seed in range(20) for position in range(20)}) == 400


def test_augmentation_is_independent_of_the_shuffle():
    order = [index for _, index in first_batches(1, 100, 100, seed=0)[0]]
    assert augmentation_generator(0, 0).permutation(100).tolist() != order
    np.testing.assert_array_equal(sorted(order), range(100))


def test_portrait_and_square_are_one_group():
    assert aspect_ratio_groups([(3, 4), (4, 3), (4, 4)]) == [0, 1, 1]

"""Loaders for semantic segmentation: labels stay with their pixels, and runs can be repeated."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from semantic_sets import image_of, labels_of, load, save, write_pair
from torch.nn.functional import interpolate

from cascade_det.data.semantic import build_semantic_test_loader, build_semantic_train_loader
from cascade_det.data.semantic.transforms import AUGMENTATIONS, SemanticTransform, rotated
from cascade_det.data.transforms import TrainTransform
from cascade_det.errors import ConfigError, DatasetError

TRAIN = {
    "min_sizes": (16, 24, 32),
    "max_size": 60,
    "sampling": "choice",
    "flip": "horizontal",
    "augmentation": "flip",
    "image_format": "BGR",
    "images_per_batch": 2,
    "num_workers": 0,
    "aspect_ratio_grouping": True,
    "seed": 3,
}
TEST = {
    "min_sizes": (15,),
    "max_size": 60,
    "image_format": "BGR",
    "images_per_batch": 2,
    "num_workers": 0,
}
ANY = np.random.default_rng(0)


def take(loader, number):
    return list(itertools.islice(loader, number))


def assert_same_batches(ours, theirs):
    for one, other in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            same = torch.equal(value, other[key]) if key in ("image", "sem_seg") else None
            assert same if same is not None else value == other[key]


def blocks(height, width, side, seed):
    """Labels of square blocks, so that most pixels have neighbours of their own label."""
    small = np.random.default_rng(seed).integers(0, 6, (height, width), np.uint8)
    return np.kron(small, np.ones((side, side), np.uint8))


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.integers(12, 80),
    st.sampled_from(["horizontal", "vertical", "none"]),
    st.booleans(),
    st.integers(0, 2**32),
)
@settings(max_examples=40)
def test_labels_stay_with_their_pixels(shape, short_edge, flip, grey, seed):
    """The image encodes the labels: 40 times the label, but where two labels meet."""
    labels = blocks(*shape, 12, seed)
    image = (40.0 * labels).astype(np.float32) if grey else image_of(labels)
    before = image.copy(), labels.copy()
    resize = TrainTransform(min_sizes=(short_edge,), max_size=400, sampling="choice", flip=flip)
    moved, found = SemanticTransform(resize, "flip")(image, labels, np.random.default_rng(seed))
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(labels, before[1])
    assert found.shape == moved.shape[:2]
    assert found.dtype == np.uint8
    levels = moved if grey else moved[..., 0]
    assert levels.dtype == (np.float32 if grey else np.uint8)
    # A pixel is interpolated from those within a pixel of the coarser of both images.
    reach = 2 * (int(np.ceil(short_edge / min(labels.shape))) + 1) + 1
    alike = ndimage.maximum_filter(found, reach) == ndimage.minimum_filter(found, reach)
    np.testing.assert_allclose(levels[alike], 40.0 * found[alike], atol=0.51)


@pytest.mark.parametrize("seed", range(12))
def test_labels_rotate_with_their_pixels(seed):
    labels = labels_of(17, 24, classes=6)
    resize = TrainTransform(min_sizes=(0,), max_size=99, sampling="choice", flip="horizontal")
    transform = SemanticTransform(resize, "rotate")
    moved, found = transform(image_of(labels), labels, np.random.default_rng(seed))
    np.testing.assert_array_equal(moved, image_of(found))
    grey = (40.0 * labels).astype(np.float32)
    moved, found = transform(grey, labels, np.random.default_rng(seed))
    np.testing.assert_array_equal(moved, 40.0 * found)


@pytest.mark.parametrize("flip", ["horizontal", "vertical"])
def test_flips_without_resizing_are_numpys(flip):
    labels = labels_of(7, 9)
    resize = TrainTransform(min_sizes=(0,), max_size=99, sampling="choice", flip=flip)
    transform = SemanticTransform(resize, "flip")
    seen = set()
    for seed in range(12):
        image, found = transform(image_of(labels), labels, np.random.default_rng(seed))
        np.testing.assert_array_equal(image, image_of(found))
        mirrored = np.flip(labels, 1 if flip == "horizontal" else 0)
        seen.add("kept" if np.array_equal(found, labels) else "mirrored")
        assert np.array_equal(found, labels) or np.array_equal(found, mirrored)
    assert seen == {"kept", "mirrored"}


@pytest.mark.parametrize("short_edge", [5, 13, 48])
def test_labels_are_resized_as_torch_does_to_the_nearest(short_edge):
    labels = labels_of(25, 33, classes=9)  # odd sides: no centre lies between two pixels
    resize = TrainTransform(min_sizes=(short_edge,), max_size=500, sampling="choice", flip="none")
    _, found = SemanticTransform(resize, "flip")(image_of(labels), labels, ANY)
    expected = interpolate(
        torch.from_numpy(labels)[None, None].float(), found.shape, mode="nearest-exact"
    )
    np.testing.assert_array_equal(found, expected[0, 0].numpy())


def test_the_published_augmentation_draws_what_it_says():
    labels = labels_of(40, 40, classes=200)
    turns = [np.rot90(labels, k) for k in range(4)]
    turned = {np.flip(t, axis).tobytes() for t in turns for axis in (0, 1)}
    counts = {"turned": 0, "kept": 0, "rotated": 0}
    generator = np.random.default_rng(0)
    for _ in range(600):
        image, found = rotated(labels.astype(np.float32), labels, generator)
        np.testing.assert_array_equal(image, found)
        if np.array_equal(found, labels):
            counts["kept"] += 1
        else:
            counts["turned" if found.tobytes() in turned else "rotated"] += 1
    # Of the 40 angles, -1, 0 and 1 degree move no pixel by half its side: they keep as well.
    shares = [counts[key] / 600 for key in ("turned", "kept", "rotated")]
    np.testing.assert_allclose(shares, [0.5, 0.25 * 43 / 40, 0.25 * 37 / 40], atol=0.06)


def test_rotations_are_scipys_of_order_0():
    labels = blocks(5, 7, 9, 1)
    image = Image.fromarray(labels)
    for angle in range(-20, 20, 3):
        ours = np.asarray(image.rotate(angle, Image.Resampling.NEAREST))
        theirs = ndimage.rotate(labels, angle, order=0, reshape=False)
        # SciPy's image ends at the centres of its last pixels, Pillow's half a pixel later.
        inside = ndimage.rotate(np.ones_like(labels), angle, order=0, reshape=False) == 1
        assert (ours != theirs)[inside].mean() < 0.002  # ties
        assert inside.mean() > 0.6


# -- training -------------------------------------------------------------------------------------


def test_training_samples_have_their_documented_form(pairs):
    dataset = load(pairs)
    seen = set()
    for batch in take(build_semantic_train_loader([dataset], **TRAIN), 12):
        assert len(batch) == 2
        assert len({sample["width"] > sample["height"] for sample in batch}) == 1
        for sample in batch:
            assert sample["image"].dtype == torch.uint8
            assert sample["sem_seg"].dtype == torch.int64
            assert sample["image"].is_contiguous()
            assert sample["sem_seg"].is_contiguous()
            assert sample["image"].shape == (3, *sample["sem_seg"].shape)
            assert min(sample["sem_seg"].shape) in TRAIN["min_sizes"]
            record = dataset.records[sample["image_id"]]
            for key in ("height", "width", "file_name"):
                assert sample[key] == getattr(record, key)
            assert sample["sem_seg_file_name"] == record.label_file
            seen.add(sample["image_id"])
    assert seen == set(range(5))


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_batches_depend_on_seed_and_number_alone(pairs, augmentation):
    datasets = [load(pairs)]
    arguments = TRAIN | {"augmentation": augmentation}
    whole = take(build_semantic_train_loader(datasets, **arguments), 8)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    resumed = build_semantic_train_loader(datasets, **arguments | {"num_workers": 2}, start_batch=5)
    assert_same_batches(take(resumed, 3), whole[5:])
    parts = [
        take(build_semantic_train_loader(datasets, **arguments, share=(rank, 2)), 8)
        for rank in range(2)
    ]
    joined = [one + other for one, other in zip(*parts, strict=True)]
    assert_same_batches(joined, whole)
    other = take(build_semantic_train_loader(datasets, **arguments | {"seed": 4}), 8)
    with pytest.raises(AssertionError):
        assert_same_batches(other, whole)


def test_an_image_that_breaks_later_stops_or_is_replaced(pairs, caplog):
    dataset = load(pairs)
    (pairs / "images" / "3.png").write_bytes(b"broken")
    with pytest.raises(DatasetError, match=r"3\.png: cannot be read"):
        take(build_semantic_train_loader([dataset], **TRAIN), 8)
    batches = take(build_semantic_train_loader([dataset], **TRAIN, on_bad_data="skip"), 8)
    assert 2 not in {sample["image_id"] for batch in batches for sample in batch}
    assert "Training on another image instead" in caplog.text


def test_a_file_that_changes_its_size_is_named(pairs):
    dataset = load(pairs)
    save(pairs / "labels" / "3.png", labels_of(5, 5))
    with pytest.raises(DatasetError, match=r"3\.png: is 5x5 pixels .* was 40x24 when"):
        take(build_semantic_train_loader([dataset], **TRAIN), 8)


def test_what_cannot_be_trained_on_is_told(pairs, tmp_path):
    dataset = load(pairs)
    with pytest.raises(ConfigError, match="IMS_PER_BATCH is 2, which 3 processes"):
        build_semantic_train_loader([dataset], **TRAIN, share=(0, 3))
    save(tmp_path / "masks" / "1.png", labels_of(24, 40))
    for number in range(2, 6):
        save(tmp_path / "masks" / f"{number}.png", labels_of(24, 40))
    for number in (2, 4):
        save(tmp_path / "images" / f"{number}.png", image_of(labels_of(24, 40)))
    with pytest.raises(DatasetError, match="different classes: ground, tree, house, and backgr"):
        build_semantic_train_loader([dataset, load(tmp_path, "polyp")], **TRAIN)


# -- testing --------------------------------------------------------------------------------------


def test_every_test_image_comes_once_in_order(pairs):
    dataset = load(pairs, decode=True)
    batches = list(build_semantic_test_loader(dataset, **TEST))
    assert [[sample["image_id"] for sample in batch] for batch in batches] == [[0, 1], [2, 3], [4]]
    assert "sem_seg" not in batches[0][0]
    shared = [
        batch
        for rank in range(3)
        for batch in build_semantic_test_loader(dataset, **TEST, share=(rank, 3))
    ]
    assert [sample["image_id"] for batch in shared for sample in batch] == [0, 1, 2, 3, 4]
    for batch in build_semantic_test_loader(dataset, **TEST, annotated=True):
        for sample in batch:
            assert min(sample["sem_seg"].shape) == 15
            assert sample["image"].shape[1:] == sample["sem_seg"].shape


def test_grey_levels_between_0_and_1_are_three_equal_channels_of_float32(tmp_path):
    image = np.linspace(0, 1, 24, dtype=np.float32).reshape(4, 6)
    np.savez(tmp_path / "a.npz", image=image, label=labels_of(4, 6))
    dataset = load(tmp_path, "synapse")
    arguments = TEST | {"min_sizes": (0,)}
    ((sample,),) = build_semantic_test_loader(dataset, **arguments, annotated=True)
    assert sample["image"].dtype == torch.float32
    assert sample["image"].is_contiguous()
    for channel in sample["image"]:
        np.testing.assert_array_equal(channel.numpy(), 255 * image)
    np.testing.assert_array_equal(sample["sem_seg"].numpy(), labels_of(4, 6))
    assert "sem_seg_file_name" not in sample
    (samples,) = take(build_semantic_train_loader([dataset], **TRAIN | {"min_sizes": (8,)}), 1)
    assert samples[0]["image"].shape == (3, 8, 12)


def test_the_order_of_channels_is_the_asked_for(tmp_path):
    write_pair(tmp_path, "a")
    picture = np.zeros((6, 8, 3), np.uint8)
    picture[..., 0] = 200  # red
    save(tmp_path / "images" / "a.png", picture)
    for image_format, red in (("RGB", 0), ("BGR", 2)):
        arguments = TEST | {"image_format": image_format}
        ((sample,),) = build_semantic_test_loader(load(tmp_path), **arguments)
        assert sample["image"].amax((1, 2)).argmax() == red

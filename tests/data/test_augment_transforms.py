"""Entries of one image: objects against their bitmaps, and pixels against torchvision."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from cascade_det.config.augment_keys import AUGMENTATIONS
from cascade_det.data.augment_mixing import MIXES
from cascade_det.data.augment_transforms import PHOTOMETRIC, build_transform
from cascade_det.data.sample_masks import boxes_of_masks
from cascade_det.data.scene import Scene
from cascade_det.masks.clipping import bitmap_box, polygons_box
from cascade_det.masks.polygons import draw_polygons

HEIGHT, WIDTH = 40, 56
# Arguments that move objects much, beside the defaults of the others.
GEOMETRIC = {
    "RandomAffine": {
        **{"degrees": (-180, 180), "translate": (0.3, 0.3), "scale": (0.4, 2.0)},
        "shear": (-20, 20, -20, 20),
    },
    "RandomRotation": {"degrees": (-180, 180), "expand": True},
    "RandomIoUCrop": {},
    "ScaleJitter": {"target_size": (50, 50), "scale_range": (0.5, 3.0)},
    "RandomCrop": {"size": (30, 70), "pad_if_needed": True},
    "RandomHorizontalFlip": {"p": 1.0},
    "RandomVerticalFlip": {"p": 1.0},
}
TURNS = ("RandomAffine", "RandomRotation")


def build(name, **arguments):
    defaults = {key: argument.default for key, argument in AUGMENTATIONS[name].arguments.items()}
    return build_transform(
        name, {**defaults, "p": 1.0, **arguments} if "p" in defaults else {**defaults, **arguments}
    )


def noise(height=HEIGHT, width=WIDTH):
    return torch.from_numpy(np.random.default_rng(5).integers(0, 256, (3, height, width), np.uint8))


def scene_of(boxes, masks):
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    return Scene(noise(), boxes, np.arange(len(boxes)), masks)


def rectangle(left, top, right, bottom):
    return np.array([left, top, right, top, right, bottom, left, bottom], np.float64)


boxes = st.tuples(
    st.integers(0, WIDTH - 8), st.integers(0, HEIGHT - 8), st.integers(6, 30), st.integers(6, 30)
).map(lambda b: (b[0], b[1], min(b[0] + b[2], WIDTH), min(b[1] + b[3], HEIGHT)))


def test_every_entry_is_tested_here():
    assert {*GEOMETRIC, *PHOTOMETRIC, *MIXES} == AUGMENTATIONS.keys()


@pytest.mark.parametrize("name", GEOMETRIC)
@settings(max_examples=12)
@given(box=boxes, seed=st.integers(0, 2**31))
def test_boxes_polygons_and_bitmaps_move_together(name, box, seed):
    """The same rectangle as a box, as a polygon and as a bitmap, which torchvision moves."""
    polygon = rectangle(*box)
    bitmap = draw_polygons([polygon], HEIGHT, WIDTH)
    torch.manual_seed(seed)
    moved = build(name, **GEOMETRIC[name])(scene_of([box, box], [[polygon], bitmap]))
    height, width = moved.size
    if len(moved.classes) < 2:  # at a border one of two may have a pixel left
        # All that is left of the other is a sliver, of fewer pixels than its outline has.
        for mask, left in zip(moved.masks, moved.boxes, strict=True):
            bits = draw_polygons(mask, height, width) if isinstance(mask, list) else mask
            assert bits.sum() <= (left[2:] - left[:2]).sum() + 4
        return
    polygons, bits = moved.masks
    assert bits.shape == (height, width)
    np.testing.assert_array_equal(moved.boxes[0], moved.boxes[1])
    drawn = draw_polygons(polygons, height, width)
    outline = 2 * np.ptp(polygons[0].reshape(-1, 2), axis=0).sum()
    assert (drawn != bits).sum() <= 1.5 * outline + 4  # a pixel to each side of the outline
    ends = polygons_box(polygons)
    if (ends > 0).all() and (ends < [width, height] * 2).all():
        # At a border a polygon may end in a tip that is thinner than a pixel.
        np.testing.assert_allclose(ends, bitmap_box(bits), atol=1.6)
    around = moved.boxes[0]
    for inner in (polygons_box(polygons), bitmap_box(bits)):
        assert (inner[:2] >= around[:2] - 1).all()
        assert (inner[2:] <= around[2:] + 1).all()
    inside = (around > 0).all() and (around < [width, height] * 2).all()
    if inside or name not in TURNS:  # corners of a turned box may be cut off
        np.testing.assert_allclose(polygons_box(polygons), around, atol=1e-6)


@pytest.mark.parametrize("name", TURNS)
def test_turned_boxes_are_as_tight_as_their_masks(name):
    """A diamond turned by 45 degrees is a square; the box of its turned box is twice as large."""
    diamond = np.array([28, 10, 38, 20, 28, 30, 18, 20], np.float64)
    scene = scene_of([(18, 10, 38, 30)], [[diamond]])
    turned = build(name, degrees=(45, 45), p=1.0)(scene)
    np.testing.assert_allclose(np.ptp(turned.boxes.reshape(2, 2), axis=0), 20 * 2**0.5, atol=0.6)
    polygons = [[torch.from_numpy(p) for p in turned.masks[0]]]
    (box,), kept = boxes_of_masks(turned.boxes.astype(np.float32), polygons)
    np.testing.assert_allclose(box, [28 - 7.07, 20 - 7.07, 28 + 7.07, 20 + 7.07], atol=0.01)
    assert kept.all()


@pytest.mark.parametrize("name", PHOTOMETRIC)
def test_colours_move_nothing_and_are_torchvisions(name):
    scene = scene_of([(3, 4, 20, 30)], None)
    arguments = {key: a.default for key, a in AUGMENTATIONS[name].arguments.items()}
    if name == "ColorJitter":
        arguments |= {"brightness": 0.5, "hue": 0.2}
    torch.manual_seed(3)
    changed = build_transform(name, {**arguments, "p": 1.0})(scene)
    assert changed.image.dtype == torch.uint8
    assert not torch.equal(changed.image, scene.image)
    np.testing.assert_array_equal(changed.boxes, scene.boxes)
    torch.manual_seed(3)
    if name != "RandomPhotometricDistort":
        del arguments["p"]
        torch.rand(())  # whether to apply it at all
    else:
        arguments["p"] = 1.0
        torch.rand(())
    if name == "RandomGrayscale":
        arguments["p"] = 1.0
        torch.testing.assert_close(changed.image, v2.Grayscale(3)(scene.image))
    else:
        expected = getattr(v2, name)(**arguments)(scene.image)
        torch.testing.assert_close(changed.image, expected, rtol=0, atol=0)


def test_probabilities():
    scene = scene_of([], None)
    for probability, low, high in ((0.0, 0, 0), (1.0, 400, 400), (0.25, 70, 130)):
        flip = build("RandomHorizontalFlip", p=probability)
        changed = sum(flip(scene).image is not scene.image for _ in range(400))
        assert low <= changed <= high


def test_sizes_are_height_and_width():
    jitter = build("ScaleJitter", target_size=(80, 112), scale_range=(1.0, 1.0))
    assert jitter(scene_of([], None)).size == (80, 112)
    wide = build("ScaleJitter", target_size=(80, 1000), scale_range=(1.0, 1.0))
    assert wide(scene_of([], None)).size == (80, 112)
    tiny = build("ScaleJitter", target_size=(1, 1), scale_range=(0.1, 0.1))
    assert tiny(scene_of([(1, 1, 30, 30)], None)).size == (2, 2)
    crop = build("RandomCrop", size=(20, 100))
    assert crop(scene_of([], None)).size == (20, WIDTH)
    crop = build("RandomCrop", size=(20, 100), pad_if_needed=True)
    assert crop(scene_of([], None)).size == (20, 100)


def test_crops_of_nothing_end():
    crop = build("RandomIoUCrop")
    for _ in range(20):
        assert crop(scene_of([], None)).size == (HEIGHT, WIDTH)
    small = Scene(noise(2, 2), np.array([[0.0, 0, 2, 2]]), np.zeros(1, np.int64), None)
    assert crop(small).size == (2, 2)


def test_crops_keep_objects_whose_centre_is_inside():
    grid = [(x, y, x + 8, y + 8) for x in range(0, 48, 8) for y in range(0, 40, 8)]
    scene, crop, cropped = scene_of(grid, None), build("RandomIoUCrop"), 0
    for _ in range(30):
        part = crop(scene)
        if part.size == scene.size:
            continue
        cropped += 1
        place = [
            (top, left)
            for top in range(HEIGHT - part.size[0] + 1)
            for left in range(WIDTH - part.size[1] + 1)
            if torch.equal(
                scene.image[:, top : top + part.size[0], left : left + part.size[1]], part.image
            )
        ]
        ((top, left),) = place
        kept = [
            number
            for number, (x, y, *_) in enumerate(grid)
            if left < x + 4 < left + part.size[1] and top < y + 4 < top + part.size[0]
        ]
        assert part.classes.tolist() == kept
    assert cropped > 5


def test_fill_is_grey_for_images_and_nothing_for_masks():
    bitmap = np.ones((HEIGHT, WIDTH), bool)
    scene = scene_of([(0, 0, WIDTH, HEIGHT)], [bitmap])
    shrunk = build("RandomAffine", scale=(0.5, 0.5), fill=77)(scene)
    assert (shrunk.image[:, 0] == 77).all()
    assert shrunk.masks[0].sum() == HEIGHT * WIDTH / 4
    padded = build("RandomCrop", size=(200, 200), pad_if_needed=True, fill=5)(scene)
    assert (padded.image[:, 0, 0] == 5).all()
    assert padded.masks[0].sum() == HEIGHT * WIDTH


@pytest.mark.parametrize(("height", "width"), [(1, 30), (5, 5), (30, 3)])
def test_images_smaller_than_the_kernel_are_blurred(height, width):
    """Constant along an axis stays constant there, and the mean of two halves is between them."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    axis = 2 if width >= height else 1
    image.narrow(axis, 0, image.shape[axis] // 2).fill_(200)
    scene = Scene(image, np.zeros((0, 4)), np.zeros(0, np.int64), None)
    blurred = build("GaussianBlur", kernel_size=99, sigma=(1.0, 1.0))(scene).image
    assert blurred.shape == image.shape
    assert not torch.equal(blurred, image)
    along = blurred.select(0, 0).float().mean(dim=2 - axis)
    assert (along.diff() <= 0).all()
    assert torch.equal(blurred.amax(dim=3 - axis), blurred.amin(dim=3 - axis))
